"""Several runs below one folder: seeds, points of a grid, recipes.

``results.json`` there has the scores of the finished runs, so that a series that was cut off can be
resumed: finished runs are not repeated, an unfinished one is resumed.
"""

import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from os.path import isfile
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from rich.console import Console

from ..config.recipe import Recipe
from ..data.rows import shorten
from ..metrics.read import read_step_lines
from ..utils.errors import InputError
from ..utils.files import write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes
from .resume import check_scores_of
from .run import pretrained_encoder

RESULTS = "results.json"

MOST_RUNS = 10_000
"""Of a series, which is planned as a whole before it begins."""


Score = Annotated[FiniteFloat, Field(ge=-1e100, le=1e100)]
"""Of float32 predictions; the squares of scores do not overflow."""
Seconds = Annotated[FiniteFloat, Field(ge=0)]


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


class Result(NamedTuple):
    """End of a run of the series.

    Attributes:
        group: of its spec.
        scores: dev scores of the best epoch, by task and ``overall``; none where no task is
            trained.
        seconds: that its training steps took.
    """

    group: str
    scores: dict[str, Score]
    seconds: Seconds


class TimeLeft:
    """The time that a series needs yet, by what this session needed so far."""

    def __init__(self) -> None:
        self._done, self._begun = 0.0, time.monotonic()

    def add(self, work: float) -> None:
        """Count work that is done, in steps or runs."""
        self._done += work

    def text(self, left: float) -> str:
        """Return ``, about 0:12:30 left`` for so much work; empty before anything is done."""
        if not self._done:
            return ""
        seconds = (time.monotonic() - self._begun) / self._done * left
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
                    f"{RESULTS} are unknown; put it back, remove it there, or give another --out"
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
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = shorten("".join(f"{part}: " for part in problem["loc"]))
        raise InputError(
            f"{file}: not the results of a series ({where}{problem['msg']}); remove it, and the "
            "same sweep reads them from the runs again"
        ) from None
    for name in results:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"{file}: not the results of a series ({name!r} is no folder below it); remove it, "
                "and the same sweep reads them from the runs again"
            )
    return results


def write_results(folder: Path, results: Mapping[str, Result]) -> None:
    """Write the results of a series.

    Raises:
        InputError: the system refuses it.
    """
    content = {name: result._asdict() for name, result in results.items()}
    write_text(folder / RESULTS, dump_json(content, indent=2) + "\n")


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
