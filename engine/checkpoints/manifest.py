"""``manifest.json``: the contents of a checkpoint's folder, and the checksum of every file in it.

It is the last file to be written, so a folder that has one is complete.
"""

import hashlib
import math
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    field_serializer,
)

from ..utils.errors import InputError
from ..utils.files import explained, write_text
from ..utils.json_text import dump_json
from ..utils.memory import machine_memory
from ..utils.untrusted_io import read_bytes

_NAME = "manifest.json"

_FIRST_FIELDS = 5
"""Fields of :class:`Progress` that every checkpoint has."""

Count = Annotated[int, Field(ge=0)]


class Progress(NamedTuple):
    """Progress of a run.

    Attributes:
        step: optimizer steps done.
        best_score: best deciding dev score so far; None before the first evaluation.
        best_step: the step that reached it.
        phase: the number of the recipe's phase that it is in, from 0.
        phase_start: the steps of the phases before.
        phase_best: best deciding dev score of this phase.
        stale: evaluations of this phase in a row, up to the last one, without a better one.
        top: steps and deciding scores of the best evaluations of this phase, the best first, as
            many as ``average_best`` takes; none in a phase that is not averaged.
        averaged: of a checkpoint that holds an average, the steps that it is made of.
    """

    step: Count = 0
    best_score: FiniteFloat | None = None
    best_step: Count | None = None
    phase: Count = 0
    phase_start: Count = 0
    phase_best: FiniteFloat | None = None
    stale: Count = 0
    top: tuple[tuple[Count, FiniteFloat], ...] = ()
    averaged: tuple[Count, ...] = ()

    @property
    def phase_step(self) -> int:
        """Steps done in this phase."""
        return self.step - self.phase_start

    @property
    def source(self) -> str:
        """Where the weights come from: ``step 5``, or ``the average of steps 3, 5``."""
        return describe_source(self.step, self.averaged)

    def is_beaten_by(self, score: float) -> bool:
        """Return whether a score is finite and better than the best so far."""
        return _is_better(score, self.best_score)

    def evaluated(self, score: float, keep: int = 0) -> "Progress":
        """Return the progress after an evaluation with this deciding score.

        Args:
            score: higher is better.
            keep: how many of the best evaluations of the phase are to be averaged.
        """
        progress = self
        if keep and math.isfinite(score):
            top = sorted([*self.top, (self.step, score)], key=lambda each: -each[1])
            progress = progress._replace(top=tuple(top[:keep]))  # of equal ones the first
        if progress.is_beaten_by(score):
            progress = progress._replace(best_score=score, best_step=self.step)
        if _is_better(score, self.phase_best):
            return progress._replace(phase_best=score, stale=0)
        return progress._replace(stale=self.stale + 1)

    def in_phase(self, phase: int) -> "Progress":
        """Return the progress as a later phase begins."""
        return Progress(self.step, self.best_score, self.best_step, phase, self.step)


def describe_source(step: int, averaged: Sequence[int]) -> str:
    """Return what weights are those of, for a title."""
    steps = ", ".join(map(str, sorted(averaged)))
    return f"the average of steps {steps}" if steps else f"step {step}"


def _is_better(score: float, best: float | None) -> bool:
    return math.isfinite(score) and (best is None or score > best)


class Place(BaseModel):
    """Place of a parameter in the checkpoint's vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bucket: str
    offset: Count
    """Elements before it in the bucket."""
    shape: tuple[Count, ...]


class Manifest(BaseModel):
    """Description of a checkpoint's files and vectors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(default=1, ge=1, le=1)
    progress: Progress
    places: dict[str, Place] = {}
    """Of each parameter, by name, where the weights are stored as flat vectors."""
    thresholds: dict[str, tuple[FiniteFloat, ...]] = {}
    """Logits above which tasks answer yes, by task, where they were chosen on the dev data."""
    ranks: Count = 0
    """Processes that trained it, where several would each read data of their own; else 0."""
    files: dict[str, str] = {}
    """The SHA-256 of every file, by its name."""
    digest: str = ""
    """Of the fields above."""

    @field_serializer("progress")
    def _without_later_defaults(self, progress: Progress) -> list[Any]:
        """Leave out what checkpoints without it had no field for: their digests stay the same."""
        values, defaults = list(progress), list(Progress())
        while len(values) > _FIRST_FIELDS and values[-1] == defaults[len(values) - 1]:
            values.pop()
        return values

    def expected_digest(self) -> str:
        """Return the SHA-256 of all other fields."""
        content = self.content()
        del content["digest"]
        return hashlib.sha256(dump_json(content, sort_keys=True).encode()).hexdigest()

    def content(self) -> dict[str, Any]:
        """Return the fields as JSON has them, without what earlier checkpoints had no field for."""
        later = {"thresholds": self.thresholds, "ranks": self.ranks}
        return self.model_dump(
            mode="json", exclude={name for name, value in later.items() if not value}
        )


def seal(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder whose other files are complete.

    Raises:
        InputError: the disk is full, or the like.
    """
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    manifest = manifest.model_copy(update={"files": files})
    manifest = manifest.model_copy(update={"digest": manifest.expected_digest()})
    write_text(folder / _NAME, dump_json(manifest.content()) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest.

    Raises:
        InputError: it is missing or damaged.
    """
    file = folder / _NAME
    content = read_bytes(file)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise InputError(f"{file}: damaged at {where}: {problem['msg']}") from None
    if manifest.digest != manifest.expected_digest():
        raise InputError(f"{file}: damaged: its checksum is not the one written")
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of a checkpoint against its checksum; return the manifest.

    Raises:
        InputError: a file is missing, added, or not what was written.
    """
    manifest = read_manifest(folder)
    with explained("look into", folder):
        found = {path.name for path in folder.iterdir()} - {_NAME}
    for name in sorted(found ^ manifest.files.keys()):
        what = "is no part of this checkpoint" if name in found else "is missing"
        raise InputError(f"{folder}: damaged: {name!r} {what}")
    for name, digest in manifest.files.items():
        if not isfile(folder / name):  # a pipe, say, which reading would wait for
            raise InputError(f"{folder / name}: damaged: no regular file")
        with explained("read", folder / name):
            size = (folder / name).stat().st_size
            if size > machine_memory():  # a hole, say, which reading would take hours for
                raise InputError(f"{folder / name}: damaged: has {size:,} bytes")
            damaged = _digest(folder / name) != digest
        if damaged:
            raise InputError(f"{folder / name}: damaged: its checksum is not the one written")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
