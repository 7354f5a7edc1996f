"""``series.json``: what the tables and pictures of a series of runs are made from.

It refers to no checkpoint, log or path, so that they can be made again after the runs are gone.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from ..data.rows import shorten
from ..runs.experiments import Score, Seconds
from ..runs.scoring import Criterion
from ..utils.errors import InputError
from ..utils.field_types import Count, Name
from ..utils.json_text import dump_json
from ..utils.untrusted_io import LARGEST_DOCUMENT, read_bytes
from .machine import Machine

PARTS = 20
"""Equal parts of a run that its course has means of."""

Means = Annotated[list[FiniteFloat | None], Field(min_length=PARTS, max_length=PARTS)]
"""A mean for each part of a run; None where nothing was measured."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


Setting = Annotated[Name, Field(pattern=r"^[^=]*[^=\s][^=]*=")]
"""``key=value``."""


class Course(_Entry):
    """Course of a run: means over each of its equal parts."""

    first_step: Count
    """Of the log, whose beginning may have been deleted (``keep_logs``)."""
    conflict_rate: Means
    """Share of the pairs of tasks whose gradients' cosine is negative."""
    cosines: dict[Name, Means]
    """Of the task gradients, by pair (``sst/sts``)."""
    task_grad_norms: dict[Name, Means]
    """By task."""
    weights: dict[Name, Means]
    """After balancing, by task."""
    sum_cosine: Means
    """Cosine of the combined gradient with the plain sum of the task gradients; None where layers
    or tensors have weights of their own."""


class RunRecord(_Entry):
    """A run that has a result."""

    name: Name
    """Its folder, below that of the series."""
    group: Name
    """What it is a repetition of."""
    point: tuple[Setting, ...]
    """Settings that tell its group from others, ``key=value`` each."""
    seed: Count
    scores: dict[Name, Score]
    """On dev, of the best epoch, of the tasks that it trains; ``overall`` if those are all."""
    decided_by: Name
    """The score that chose the epoch (``best_of``)."""
    metric: Name
    """Of that score."""
    sign: Literal[1, -1]
    """-1 where less is better."""
    decision: Score | None
    """That score, also where it is of tasks that the run does not train."""
    seconds: Seconds
    """That its training steps took."""
    steps: Count
    """Trained; 0 if there is no log."""
    precision: Name
    """Of its recipe."""
    read_with: Machine
    """Where its folder was read."""
    conflict_rate: FiniteFloat | None
    """Mean over the steps; None where no step had two tasks, or there is no log."""
    cosines: dict[Name, FiniteFloat | None]
    """Means over the steps, by pair."""
    sum_cosine: FiniteFloat | None
    """Mean over the steps, as in the course."""
    course: Course | None
    """None without a log."""

    @property
    def criterion(self) -> Criterion:
        """What its epochs were compared by."""
        return Criterion(self.decided_by, self.metric, self.sign)


class Unfinished(_Entry):
    """A run without a result: it diverged, did not fit in memory, or is not done yet."""

    name: Name
    group: Name
    point: tuple[Setting, ...]
    seed: Count
    steps: Count
    """In its log."""
    skipped: bool
    """Whether the last of them was skipped, since a gradient was not finite."""


class SeriesRecord(_Entry):
    """A series: the runs of one folder."""

    name: Name
    """The folder's, which tells it from others."""
    runs: list[RunRecord]
    unfinished: list[Unfinished]
    without_log: list[Name]
    """A line for each run whose log is missing or damaged."""

    @field_validator("runs")
    @classmethod
    def _are_distinct(cls, runs: list[RunRecord]) -> list[RunRecord]:
        names = [run.name for run in runs]
        seeds = {(run.group, run.seed) for run in runs}
        if len(set(names)) < len(names) or len(seeds) < len(runs):
            raise ValueError("a run stands there twice")
        return runs

    def joined(self, later: "SeriesRecord") -> "SeriesRecord":
        """Return this and what was read of the same series later, which counts."""
        runs = {run.name: run for run in (*self.runs, *later.runs)}
        unfinished = {run.name: run for run in (*self.unfinished, *later.unfinished)}
        read = tuple(f"{run.name}: " for run in later.runs)
        lines = [line for line in self.without_log if not line.startswith(read)]
        return later.model_copy(
            update={
                "runs": list(runs.values()),
                "unfinished": [run for name, run in unfinished.items() if name not in runs],
                "without_log": [*lines, *later.without_log],
            }
        )


def join(records: Iterable[SeriesRecord]) -> list[SeriesRecord]:
    """Return the records of each series as one."""
    found: dict[str, SeriesRecord] = {}
    for record in records:
        before = found.get(record.name)
        found[record.name] = record if before is None else before.joined(record)
    return list(found.values())


def read_records(path: Path) -> list[SeriesRecord]:
    """Read a ``series.json``.

    Raises:
        InputError: it is none.
    """
    content = read_bytes(path, 4 * LARGEST_DOCUMENT)
    try:
        return TypeAdapter(list[SeriesRecord]).validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f", {part}" for part in problem["loc"])
        raise InputError(
            f"{path}{shorten(where)}: not the record of a series ({problem['msg']}); make it again "
            "from the folder of the series"
        ) from None


def to_json(records: Sequence[SeriesRecord]) -> str:
    """Return the content of a ``series.json``, a line for each run."""
    return "[\n" + ",\n".join(map(_series_text, records)) + "\n]\n"


def _series_text(record: SeriesRecord) -> str:
    content = record.model_dump(mode="json")
    entries = [
        f"{dump_json(key)}: {_lines(value) if isinstance(value, list) else dump_json(value)}"
        for key, value in content.items()
    ]
    return "{" + ",\n".join(entries) + "}"


def _lines(values: Sequence[object]) -> str:
    return "[" + ",\n".join(map(dump_json, values)) + "]"


def means_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of what was measured, to six digits; None of nothing."""
    known = [value for value in values if value is not None]
    return float(f"{sum(known) / len(known):.6g}") if known else None


def mean_tables(tables: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Return the mean of each name in tables that may lack it."""
    names = dict.fromkeys(name for table in tables for name in table)
    return {name: means_of(table.get(name) for table in tables) for name in names}
