"""Read and check the lines of ``metrics.jsonl`` and ``evaluations.jsonl``.

A file from another program, or a damaged one, is refused with the number of the wrong line.  Only
the last line of the newest file may be incomplete, as a killed run leaves it.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ..data.rows import shorten
from ..utils.errors import InputError
from ..utils.untrusted_io import read_bytes
from .jsonl import StepLines
from .log import EVALUATIONS, STEPS

_LARGEST = torch.finfo(torch.float32).max

Whole = Annotated[int, Field(ge=0, lt=1 << 53)]
"""Whole numbers that float64 can hold."""


def _measured(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    if abs(value) > _LARGEST:
        raise ValueError("larger than fp32 holds")
    return value


Number = Annotated[float | None, AfterValidator(_measured)]
"""Null stands for what is not finite; NaN and infinities, which are no JSON, count as null."""

Json = dict[str, Any]


class _Line(BaseModel):
    model_config = ConfigDict(strict=True)

    step: Whole


class _StepLine(_Line):
    """A training step's metrics, as :class:`.log.MetricsLog` writes them."""

    lr: Number
    tokens: Whole
    losses: dict[str, Number]
    weights: dict[str, Number]
    cosines: dict[str, Number]
    conflict_rate: Number
    task_grad_norms: dict[str, Number]
    grad_norm: Number
    skipped: Annotated[int, Field(ge=0, le=1)]
    tokens_per_s: Number
    layer_cosines: dict[str, dict[str, Number]] = {}
    gpu: dict[str, Number] = {}


class _EvaluationLine(_Line):
    """The scores after a number of steps."""

    split: Literal["dev"]
    scores: dict[str, Number]


def read_step_lines(folder: Path) -> list[Json]:
    """Return the lines of all steps of a run: ``metrics.jsonl`` and its pieces put aside.

    Raises:
        InputError: a file cannot be read, or a line of it is not right.
    """
    return list(_read(StepLines(folder / STEPS).pieces, _StepLine))


def read_evaluation_lines(folder: Path) -> list[Json]:
    """Return the lines of a run's ``evaluations.jsonl``.

    Raises:
        InputError: the file cannot be read, or a line of it is not right.
    """
    return list(_read([folder / EVALUATIONS], _EvaluationLine))


def _read(pieces: Iterable[Path], model: type[_Line]) -> Iterator[Json]:
    lines = [
        (piece, number, text)
        for piece in pieces
        for number, text in enumerate(read_bytes(piece, None).splitlines(), start=1)
    ]
    before = -1
    for place, (piece, number, text) in enumerate(lines, start=1):
        try:
            line = model.model_validate_json(text)
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            if place == len(lines) and problem["type"] == "json_invalid":
                return
            where = [shorten(".".join(map(str, problem["loc"])))] if problem["loc"] else []
            raise _wrong_line(piece, number, ": ".join([*where, problem["msg"]])) from None
        if line.step <= before:
            raise _wrong_line(piece, number, f"step {line.step} follows step {before}")
        before = line.step
        yield line.model_dump(exclude_unset=True)


def _wrong_line(path: Path, number: int, reason: str) -> InputError:
    """Return the error that refuses a line."""
    return InputError(f"{path}:{number}: not a line of metrics ({reason}); remove it")
