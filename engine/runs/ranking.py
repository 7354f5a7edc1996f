"""Rank the finished runs of a series by the score that decides within each, and print them."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from os.path import isfile
from pathlib import Path

from rich.console import Console

from ..config import recipe as recipes
from ..config.recipe import Recipe
from .experiments import Result, RunSpec, differing_settings, mean_and_deviation, print_rows
from .scoring import Criterion

_OVERALL = Criterion("overall", "mean", 1)


def find_criterion(
    folder: Path, results: Mapping[str, Result], specs: Iterable[RunSpec]
) -> tuple[Criterion, str]:
    """Return what the finished runs of a series are ranked by, and a line that says so.

    It is what decides in each of them (``best_of``), or the overall score where that differs.

    Args:
        folder: of the series.
        results: its finished runs; of those of no spec the folders are read, and one whose folder
            is gone has no say.
        specs: the runs that are asked for now.

    Returns:
        The criterion, and the line; empty where there is nothing to say, since the overall score
        decides everywhere or one group is alone.

    Raises:
        InputError: the recipe of a run is damaged.
    """
    by_group = {spec.group: spec.recipe for spec in specs}
    found = dict[str, Recipe]()
    for name, result in results.items():
        file = folder / name / "recipe.toml"
        if result.group not in by_group and isfile(file):
            by_group[result.group], _ = recipes.read(str(file))
        if result.scores and result.group in by_group:
            found[result.group] = by_group[result.group]
    examples = {Criterion.of(recipe): group for group, recipe in found.items()}
    if len(examples) > 1:
        named = ", ".join(f"{criterion} in {group}" for criterion, group in examples.items())
        return _OVERALL, f"ranked by overall, since best_of differs: {named}"
    criterion = next(iter(examples), _OVERALL)
    return criterion, f"ranked by {criterion}" if len(found) > 1 and criterion != _OVERALL else ""


def mean_value(criterion: Criterion, scores: Sequence[Mapping[str, float]]) -> float:
    """Return the mean over runs, higher being better; -inf where one has no such score."""
    if not all(criterion.score in own for own in scores):
        return -math.inf
    return statistics.mean(map(criterion.value, scores))


def print_results(
    console: Console, folder: Path, results: Mapping[str, Result], specs: Sequence[RunSpec] = ()
) -> None:
    """Print the groups of a series, scores averaged over seeds.

    The best deciding score comes first, what is not scored last.

    Args:
        console: to print on.
        folder: of the series.
        results: its finished runs.
        specs: those whose points have columns of their own.

    Raises:
        InputError: the recipe of a run is damaged.
    """
    groups: dict[str, list[Result]] = {}
    for result in results.values():
        groups.setdefault(result.group, []).append(result)
    names, settings = differing_settings([spec for spec in specs if spec.group in groups])
    tasks = list(dict.fromkeys(task for result in results.values() for task in result.scores))
    tasks.sort(key="overall".__eq__)  # overall last
    criterion, line = find_criterion(folder, results, specs)

    def order(group: str) -> float:
        return -mean_value(criterion, [result.scores for result in groups[group]])

    rows = [["run", *names, "seeds", *tasks, "minutes"]]
    for group in sorted(groups, key=order):
        members = groups[group]
        columns = (
            [result.scores[task] for result in members if task in result.scores] for task in tasks
        )
        minutes = statistics.mean(result.seconds for result in members) / 60
        scores = (mean_and_deviation(values) if values else "" for values in columns)
        own = settings.get(group, [group, *("" for _ in names)])
        rows.append([*own, str(len(members)), *scores, f"{minutes:.1f}"])
    if line:
        console.print(line, soft_wrap=True, highlight=False)
    print_rows(console, rows)
