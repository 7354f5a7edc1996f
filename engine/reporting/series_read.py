"""Read the folder of a series: results, settings, and the course of conflict of each run."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from os.path import isfile, realpath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import recipe as recipes
from ..config.recipe import Recipe
from ..metrics.log import STEPS
from ..metrics.read import Json, read_step_lines
from ..runs.baseline import split_settings
from ..runs.experiments import RESULTS, Result, read_results
from ..runs.ranking import seed_of
from ..runs.scoring import Criterion, score_names
from ..utils.errors import InputError
from ..utils.file_names import distinct_names
from ..utils.files import explained
from .machine import Machine
from .series_record import (
    PARTS,
    Course,
    RunRecord,
    SeriesRecord,
    Unfinished,
    join,
    mean_tables,
    means_of,
    read_records,
)

_ESCAPED = re.compile(r"%([0-9A-F]{2})")
_HASHED = re.compile(r"-[0-9a-f]{16}$")
"""The end of a group's name that was too long for a folder."""
_SETTING = re.compile(r"[A-Za-z_][\w.-]*=.+", re.DOTALL)
_OF_ONE_RUN = {"seed", "data", "init", "description", "paper"}


def collect(places: Sequence[Path], device: torch.device) -> list[SeriesRecord]:
    """Return the records of several series, each once.

    Args:
        places: folders of series, and ``series.json`` files; two of one name are of one series, of
            whose runs the later place counts.
        device: that the runs are taken to be trained on.

    Raises:
        InputError: a folder holds no series, or a file is damaged.
    """
    with explained("look at", places[0]):
        folders = list(dict.fromkeys(Path(realpath(one)) for one in places if not one.is_file()))
    names = dict(zip(folders, distinct_names(folders), strict=True))
    return join(
        itertools.chain.from_iterable(
            read_records(place)
            if place.is_file()
            else [read_series(place, names[Path(realpath(place))], device)]
            for place in places
        )
    )


def read_series(folder: Path, name: str, device: torch.device) -> SeriesRecord:
    """Return the record of the series in a folder.

    Raises:
        InputError: it holds no result, or a file of it is damaged, but for logs, whose runs have no
            course.
    """
    results = read_results(folder)
    if not results:
        raise InputError(
            f"{folder}: holds no {RESULTS} with a finished run; give the folder of a sweep, or a "
            "series.json"
        )
    found = {run: _recipe(folder, run) for run in results}
    others = {run: _recipe(folder, run) for run in _run_names(folder) if run not in results}
    groups = {run: result.group for run, result in results.items()} | {
        run: run.rpartition("/")[0] for run in others
    }
    points = _points(groups, found | others)
    without_log: list[str] = []
    runs, machine = [], Machine.of(device)
    for run, result in results.items():
        lines, reason = _step_lines(folder / run)
        without_log += [f"{run}: {reason}"] if reason else []
        runs.append(_record(run, result, points[result.group], found[run], lines, machine))
    return SeriesRecord(
        name=name,
        runs=runs,
        unfinished=[_unfinished(folder, run, groups[run], points[groups[run]]) for run in others],
        without_log=without_log,
    )


def course_of(lines: Sequence[Json], *, one_group: bool = True) -> Course | None:
    """Return the means over equal parts of a run's steps; None of none.

    Of fewer steps than parts, each part has the step that it falls into.

    Args:
        lines: of the steps.
        one_group: whether all parameters have the same weights.
    """
    if not lines:
        return None
    ends = [number * len(lines) // PARTS for number in range(PARTS + 1)]
    parts = [lines[begin : max(end, begin + 1)] for begin, end in itertools.pairwise(ends)]
    return Course(
        first_step=lines[0]["step"],
        conflict_rate=[means_of(map(_conflict_rate, part)) for part in parts],
        cosines=_by_name(parts, "cosines"),
        task_grad_norms=_by_name(parts, "task_grad_norms"),
        weights=_by_name(parts, "weights"),
        sum_cosine=[means_of(map(sum_cosine, part)) if one_group else None for part in parts],
    )


def _by_name(parts: Sequence[Sequence[Json]], table: str) -> dict[str, list[float | None]]:
    means = [mean_tables([line[table] for line in part]) for part in parts]
    names = dict.fromkeys(name for mean in means for name in mean)
    return {name: [mean.get(name) for mean in means] for name in names}


def _conflict_rate(line: Json) -> float | None:
    """Return the conflict rate of a step; None where it had no two tasks, which is logged as 0."""
    return line["conflict_rate"] if line["cosines"] else None


def sum_cosine(line: Json) -> float | None:
    """Return the cosine of a step's combined gradient ``sum_k c_k g_k`` with ``sum_k g_k``.

    By the Gram matrix, which the logged norms and cosines give.  None where a number is missing,
    one of the two gradients is zero, or the step had one task.
    """
    norms, weights = line["task_grad_norms"], line["weights"]
    pairs = list(itertools.combinations(weights, 2))
    cosines = [line["cosines"].get(f"{one}/{other}") for one, other in pairs]
    if not pairs or None in (*norms.values(), *weights.values(), *cosines):
        return None
    names = list(weights)
    gram = np.diag([norms[name] ** 2 for name in names])
    for (one, other), cosine in zip(pairs, cosines, strict=True):
        i, j = names.index(one), names.index(other)
        gram[i, j] = gram[j, i] = cosine * norms[one] * norms[other]
    given = np.array([weights[name] for name in names])
    squares = given @ gram @ given, gram.sum()
    if not min(squares) > 0:  # rounding may leave a little less than 0 of opposed gradients
        return None
    return float((given @ gram).sum() / np.sqrt(squares).prod())


def _record(
    name: str,
    result: Result,
    point: tuple[str, ...],
    recipe: Recipe,
    lines: Sequence[Json],
    machine: Machine,
) -> RunRecord:
    criterion = Criterion.of(recipe)
    one_group = all(phase.balance_granularity == "model" for phase in recipe.in_phases.values())
    return RunRecord(
        name=name,
        group=result.group,
        point=point,
        seed=seed_of(name),
        scores=_trained_scores(recipe, result.scores),
        decided_by=criterion.score,
        metric=criterion.metric,
        sign=criterion.sign,
        decision=result.scores.get(criterion.score),
        seconds=result.seconds,
        steps=lines[-1]["step"] + 1 if lines else 0,
        precision=recipe.precision,
        read_with=machine,
        conflict_rate=means_of(map(_conflict_rate, lines)),
        cosines=mean_tables([line["cosines"] for line in lines]),
        sum_cosine=means_of(map(sum_cosine, lines)) if one_group else None,
        course=course_of(lines, one_group=one_group),
    )


def _trained_scores(recipe: Recipe, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of the tasks that a run trains; the heads of others say nothing."""
    trained = set(recipe.trained)
    names = score_names(recipe).items()
    found = {name: scores[name] for name, (task, _) in names if task in trained and name in scores}
    if "overall" in scores and trained >= recipe.tasks.keys():
        found["overall"] = scores["overall"]
    return found


def _unfinished(folder: Path, name: str, group: str, point: tuple[str, ...]) -> Unfinished:
    lines, _ = _step_lines(folder / name)
    last = lines[-1] if lines else {"step": -1, "skipped": 0}
    return Unfinished(
        name=name,
        group=group,
        point=point,
        seed=seed_of(name),
        steps=last["step"] + 1,
        skipped=bool(last["skipped"]),
    )


def _step_lines(folder: Path) -> tuple[list[Json], str]:
    """Return a run's steps, and why there are none."""
    try:
        lines = read_step_lines(folder)
    except InputError as error:
        return [], str(error).replace(f"{folder}/", "")
    return lines, "" if lines else f"{STEPS} is missing or has no step"


def _recipe(folder: Path, run: str) -> Recipe:
    file = folder / run / "recipe.toml"
    if not isfile(file):
        raise InputError(
            f"{file}: is missing, so that the settings of its scores in {RESULTS} are unknown; put "
            "it back, or remove the run there"
        )
    return recipes.read(str(file))[0]


def _run_names(folder: Path) -> Iterator[str]:
    """Yield the names of all runs in the folder of a series, as deep as they can be."""
    for depth in range(3):
        for path in sorted(folder.glob("*/" * depth + "seed-*/recipe.toml")):
            name = path.parent.relative_to(folder).as_posix()
            if re.search(r"(?:^|/)seed-\d{1,10}$", name, re.ASCII):
                yield name


def _points(
    groups: Mapping[str, str], recipes_of: Mapping[str, Recipe]
) -> dict[str, tuple[str, ...]]:
    """Return the point of each group: by its name, or, where that is cut off, by what differs.

    Args:
        groups: of each run.
        recipes_of: the settings of each run.
    """
    by_group = {group: recipes_of[run] for run, group in groups.items()}
    named = {group: _point_of(group) for group in by_group}
    cut = {group.partition("/")[0] for group, point in named.items() if point is None}
    of_cut = {group: own for group, own in by_group.items() if group.partition("/")[0] in cut}
    return {group: point or () for group, point in named.items()} | _differing(of_cut)


def _point_of(group: str) -> tuple[str, ...] | None:
    """Return the settings that the name of a group ends with; None where it was too long."""
    _, _, text = group.partition("/")
    if not text:
        return ()
    settings = split_settings(_ESCAPED.sub(lambda found: chr(int(found[1], 16)), text))
    is_whole = not _HASHED.search(text) and all(map(_SETTING.fullmatch, settings))
    return settings if is_whole else None


def _differing(recipes_of: Mapping[str, Recipe]) -> dict[str, tuple[str, ...]]:
    """Return the fields in which groups differ, as overrides."""
    flat = {
        group: dict(_flat(recipe.model_dump(mode="json"))) for group, recipe in recipes_of.items()
    }
    keys = dict.fromkeys(key for fields in flat.values() for key in fields)
    differing = [
        key
        for key in keys
        if key.partition(".")[0] not in _OF_ONE_RUN
        and len({str(fields.get(key)) for fields in flat.values()}) > 1
    ]
    return {
        group: tuple(
            recipes.override(key, fields[key]) for key in differing if fields.get(key) is not None
        )
        for group, fields in flat.items()
    }


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested tables by dotted names."""
    for key, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
