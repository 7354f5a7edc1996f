"""Several runs below one folder, one after the other: seeds, points of a grid, recipes.

``results.json`` there has the scores of the finished runs, so that a series that was cut off can be
resumed: finished runs are not repeated, an unfinished one is resumed.
"""

import re
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from os.path import isfile
from pathlib import Path
from signal import Signals
from typing import NamedTuple

from pydantic import FiniteFloat, TypeAdapter
from rich.console import Console

from ..config.recipe import Recipe
from ..metrics.read import read_step_lines
from ..utils.errors import DivergedError, InputError, OutOfMemoryError
from ..utils.files import remove_partial_files, write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes
from .folder import claimed
from .resume import check_scores_of, resume
from .run import Run, pretrained_encoder
from .scoring import read_scores

RESULTS = "results.json"

MOST_RUNS = 10_000
"""Of a series, which is planned as a whole before it begins."""


class RunSpec(NamedTuple):
    """One run of a series.

    Attributes:
        group: what it is a repetition of, which is a folder's name too.
        recipe: its settings; the seed tells it from others of its group.
        point: what the series gives it besides those that all have, as overrides; the name of the
            group ends with them.
    """

    group: str
    recipe: Recipe
    point: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's folder, below that of the series."""
        return f"{self.group}/seed-{self.recipe.seed}".lstrip("/")


class Ending(NamedTuple):
    """End of a series.

    Attributes:
        signal: that stopped it, or None.
        failed: why runs of it have no result, by their names.
        diverged: whether the numbers of one of them did not stay finite; the others do not fit in
            memory.
    """

    signal: Signals | None
    failed: dict[str, str]
    diverged: bool = False


class Result(NamedTuple):
    """End of a run of the series.

    Attributes:
        group: of its spec.
        scores: dev scores of the best epoch, by task and ``overall``; none where no task is
            trained.
        seconds: that its training steps took.
    """

    group: str
    scores: dict[str, FiniteFloat]
    seconds: FiniteFloat


class TimeLeft:
    """The time that a series needs yet, by what this session needed so far.

    Args:
        work: what is to be done, in steps or runs.
    """

    def __init__(self, work: float) -> None:
        self._left, self._done, self._begun = work, 0.0, time.monotonic()

    def add(self, work: float) -> None:
        """Count work that is done."""
        self._left -= work
        self._done += work

    def __str__(self) -> str:
        """``, about 0:12:30 left``; empty before anything is done."""
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._begun) / self._done * max(0.0, self._left)
        return f", about {timedelta(seconds=round(seconds))} left"


def seeds_of(group: str, recipe: Recipe, count: int, point: tuple[str, ...] = ()) -> list[RunSpec]:
    """Return ``count`` repetitions of a recipe, under its seed and those that follow.

    Raises:
        InputError: there are too many, or no seeds for them.
    """
    most = min(MOST_RUNS, (1 << 31) - recipe.seed)
    if count > most:
        raise InputError(f"--seeds {count}: expected at most {most}, from seed {recipe.seed} on")
    return [
        RunSpec(group, recipe.model_copy(update={"seed": recipe.seed + number}), point)
        for number in range(count)
    ]


def check_results(folder: Path, specs: Iterable[RunSpec]) -> None:
    """Hold the runs of a series that are finished against what is asked for now.

    Raises:
        InputError: one that would be shown with those of a spec was made with other settings.
    """
    recipes = {spec.group: spec.recipe for spec in specs}
    for name, result in read_results(folder).items():
        if result.group in recipes:
            if not isfile(folder / name / "recipe.toml"):
                raise InputError(
                    f"{folder / name}: is missing, so that the settings of its scores in "
                    f"{RESULTS} are unknown; give another --out"
                )
            check_scores_of(recipes[result.group], folder / name)


def check_models(folder: Path, specs: Iterable[RunSpec]) -> None:
    """Hold the runs that are still to be begun against their pretrained encoders.

    Raises:
        InputError: one of them cannot be begun.
    """
    for spec in specs:
        if spec.recipe.init and not isfile(folder / spec.name / "recipe.toml"):
            pretrained_encoder(spec.recipe)


def train_runs(
    folder: Path,
    specs: Sequence[RunSpec],
    train_run: Callable[[Run], Signals | None],
    console: Console,
    over: threading.Event | None = None,
    time_left: TimeLeft | None = None,
    work: float = 1.0,
) -> Ending:
    """Train the runs of a series that are not done yet.

    Args:
        folder: of the series, held by this process.
        specs: in the order in which they are trained.
        train_run: trains a run to its end, or until a signal, which it returns.
        console: to say on what is begun.
        over: no run is begun once it is set.
        time_left: of what is trained here and elsewhere; None for these runs alone.
        work: of one run, as ``time_left`` counts it.

    Returns:
        How it ended.  A run whose numbers do not stay finite, or that does not fit in memory, is no
        result and does not end the others; when the series is called again it goes on from its last
        checkpoint.
    """
    remove_partial_files(folder, re.compile(re.escape(RESULTS)))
    results, failed, diverged = read_results(folder), dict[str, str](), False
    left = [spec for spec in specs if spec.name not in results]
    time_left = time_left or TimeLeft(len(left))
    for number, spec in enumerate(left, start=len(specs) - len(left) + 1):
        if over is not None and over.is_set():
            break
        console.rule(spec.name)
        console.print(f"run {number} of {len(specs)}{time_left}", highlight=False)
        with claimed(folder / spec.name, resumes=True):
            run = resume(spec.recipe, folder / spec.name)
            try:
                signal = train_run(run)
            except (DivergedError, OutOfMemoryError) as error:
                console.print(f"{spec.name}: {error}", soft_wrap=True, highlight=False)
                failed[spec.name] = str(error)
                diverged = diverged or isinstance(error, DivergedError)
                time_left.add(work)
                continue
            if signal is not None:
                return Ending(signal, failed, diverged)
            recipe = run.recipe
            scores = read_scores(run.folder, recipe.tasks).scores if recipe.is_scored else {}
            seconds = training_seconds(run.folder)
        time_left.add(work)
        results[spec.name] = Result(spec.group, scores, seconds)
        content = {name: result._asdict() for name, result in results.items()}
        write_text(folder / RESULTS, dump_json(content, indent=2) + "\n")
    return Ending(None, failed, diverged)


def read_results(folder: Path) -> dict[str, Result]:
    """Return the results of a series so far, by the names of its runs.

    Raises:
        InputError: the file is damaged.
    """
    file = folder / RESULTS
    if not file.exists():
        return {}
    try:
        results = TypeAdapter(dict[str, Result]).validate_json(read_bytes(file))
        for name in results:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"{name!r} is no folder below it")
        return results
    except ValueError as error:
        raise InputError(f"{file}: not the results of a series ({error}); remove it") from None


def training_seconds(folder: Path) -> float:
    """Return how long a run's training steps took, all sessions together."""
    steps = read_step_lines(folder)
    return sum(line["tokens"] / line["tokens_per_s"] for line in steps if line["tokens_per_s"])


def print_failed(console: Console, failed: Mapping[str, str]) -> None:
    """Print a line for each run that has no result."""
    for name, reason in failed.items():
        console.print(f"no result of {name}: {reason}", soft_wrap=True, highlight=False)


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return a score, or the mean of several and their standard deviation (of a sample)."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def differing_settings(specs: Iterable[RunSpec]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the columns of a table that tell the groups of a series apart.

    Returns:
        The keys of the settings that differ among their points; and by group the cells: its name,
        which leaves out settings that have columns, and the value of each key.
    """
    points = {spec.group: dict(setting.split("=", 1) for setting in spec.point) for spec in specs}
    keys = dict.fromkeys(key for point in points.values() for key in point)
    names = [key for key in keys if len({point.get(key) for point in points.values()}) > 1]
    cells = {
        group: [
            group.partition("/")[0] if names and point else group,
            *(point.get(name, "") for name in names),
        ]
        for group, point in points.items()
    }
    return names, cells


def print_rows(console: Console, rows: Sequence[Sequence[str]]) -> None:
    """Print a table whose first column is text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        line = "  ".join([first.ljust(widths[0]), *cells])
        console.print(line.rstrip(), soft_wrap=True, highlight=False)
