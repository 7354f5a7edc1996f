"""Rank the finished runs of a series by the score that decides within each, and print them."""

import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from os.path import isfile
from pathlib import Path

from rich.console import Console

from ..config import recipe as recipes
from ..config.recipe import Recipe
from ..config.renamed import with_new_name
from ..utils.errors import InputError
from .baseline import find_baselines, place_of
from .experiments import (
    RESULTS,
    Result,
    RunSpec,
    differing_settings,
    mean_and_deviation,
    print_rows,
)
from .paired import Difference, paired_difference
from .scoring import Criterion

OVERALL = Criterion("overall", "mean", 1)


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
        return OVERALL, f"ranked by overall, since best_of differs: {named}"
    criterion = next(iter(examples), OVERALL)
    return criterion, f"ranked by {criterion}" if len(found) > 1 and criterion != OVERALL else ""


def mean_value(criterion: Criterion, scores: Sequence[Mapping[str, float]]) -> float:
    """Return the mean over runs, higher being better; -inf where one has no such score."""
    if not all(criterion.score in own for own in scores):
        return -math.inf
    return statistics.mean(map(criterion.value, scores))


def print_results(
    console: Console,
    folder: Path,
    results: Mapping[str, Result],
    specs: Sequence[RunSpec] = (),
    *,
    compare_to: str | None = None,
    families: Mapping[str, tuple[str, ...]] | None = None,
) -> None:
    """Print the groups of a series, scores averaged over seeds.

    The best deciding score comes first, what is not scored last.

    Args:
        console: to print on.
        folder: of the series.
        results: its finished runs, of the groups to show.
        specs: those whose points have columns of their own.
        compare_to: settings, ``key=value,…``, of the group from which the others' paired
            differences of the deciding score have a column; None for no such column.
        families: the groups among which the one to compare with is found, each with its point
            without tuned settings; None for those of the specs, with their whole points.

    Raises:
        InputError: the recipe of a run is damaged.
    """
    groups: dict[str, list[Result]] = {}
    for result in results.values():
        groups.setdefault(result.group, []).append(result)
    names, settings = differing_settings([spec for spec in specs if spec.group in groups])
    tasks = list(
        dict.fromkeys(task for own in groups.values() for one in own for task in one.scores)
    )
    tasks.sort(key="overall".__eq__)  # overall last
    criterion, line = find_criterion(folder, results, specs)

    def order(group: str) -> float:
        return -mean_value(criterion, [result.scores for result in groups[group]])

    points = {spec.group: spec.point for spec in specs} if families is None else families
    compared = _compared(console, compare_to, points, results, criterion)
    differences = [] if compare_to is None else [f"{criterion.score} against {compare_to}"]
    rows = [["run", *names, "seeds", *tasks, *differences, "minutes"]]
    for group in sorted(groups, key=order):
        members = groups[group]
        columns = (
            [result.scores[task] for result in members if task in result.scores] for task in tasks
        )
        minutes = statistics.mean(result.seconds for result in members) / 60
        scores = (mean_and_deviation(values) if values else "" for values in columns)
        own = settings.get(group, [group, *("" for _ in names)])
        difference = [compared.get(group, "")] if differences else []
        rows.append([*own, str(len(members)), *scores, *difference, f"{minutes:.1f}"])
    if line:
        console.print(line, soft_wrap=True, highlight=False)
    print_rows(console, rows)


def check_baseline(compare_to: str, specs: Iterable[RunSpec], tuned: Collection[str] = ()) -> None:
    """Check, before training, that each group will have one to be compared with.

    Args:
        compare_to: ``key=value,…``.
        specs: the runs of the series.
        tuned: keys of settings of which each family keeps one value.

    Raises:
        InputError: none or several have these settings.
    """
    families = {
        (spec.group.partition("/")[0], without_keys(spec.point, tuned)): spec.group
        for spec in specs
    }
    places = {group: place_of(group, point) for (_, point), group in families.items()}
    find_baselines(compare_to, places)


def without_keys(point: Iterable[str], keys: Collection[str]) -> tuple[str, ...]:
    """Return a point without the settings of some keys, which may be old names of fields."""
    fields = {with_new_name(key)[0] for key in keys}
    return tuple(setting for setting in point if key_of(setting) not in fields)


def key_of(setting: str) -> str:
    """Return the field that ``key=value`` sets, by its new name."""
    return with_new_name(setting.partition("=")[0].strip())[0]


def scores_by_seed(results: Mapping[str, Result], group: str, score: str) -> dict[int, float]:
    """Return a score of a group's finished runs by their seeds."""
    return {
        seed_of(name): result.scores[score]
        for name, result in results.items()
        if result.group == group and score in result.scores
    }


def seed_of(name: str) -> int:
    """Return the seed of a run by its name, which ends with it.

    Raises:
        InputError: it does not.
    """
    found = re.search(r"(?:^|/)seed-(\d{1,10})$", name, re.ASCII)
    if found is None:
        raise InputError(f"{RESULTS}: {name!r} is no run of a series; remove it")
    return int(found[1])


def _compared(
    console: Console,
    compare_to: str | None,
    points: Mapping[str, tuple[str, ...]],
    results: Mapping[str, Result],
    criterion: Criterion,
) -> dict[str, str]:
    """Return the cells of the differences by group; print a line where there can be none."""
    if compare_to is None:
        return {}
    try:
        places = {group: place_of(group, point) for group, point in points.items()}
        baselines = find_baselines(compare_to, places)
    except InputError as error:  # of a group that no run of is finished
        console.print(f"no differences yet: {error}", soft_wrap=True, highlight=False)
        return {}
    scores = {group: scores_by_seed(results, group, criterion.score) for group in places}
    for baseline in dict.fromkeys(baselines.values()):
        if not scores[baseline]:
            line = f"no differences from {baseline}: none of its runs has a result"
            console.print(line, soft_wrap=True, highlight=False)
    return {
        group: "baseline" if group == baseline else _spell(scores[group], scores[baseline])
        for group, baseline in baselines.items()
    }


def _spell(scores: Mapping[int, float], baseline: Mapping[int, float]) -> str:
    """Return a paired difference as a cell: ``+0.012 ± 0.004 (3 seeds)``."""
    found = paired_difference(scores, baseline)
    return "" if found is None else spell_difference(found)


def spell_difference(found: Difference) -> str:
    """Return ``+0.012 ± 0.004 (3 seeds)``: mean, standard deviation, and of how many."""
    if found.deviation is None:
        return f"{found.mean:+z.3f} (1 seed)"
    return f"{found.mean:+z.3f} ± {found.deviation:.3f} ({len(found.seeds)} seeds)"
