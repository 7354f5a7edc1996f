"""``metrics.jsonl``: a line a step, read off the device only every few steps."""

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..multitask.step import StepReport
from .files import explained, write_text


class MetricsLog:
    """Collects step reports as tensors and writes them in blocks.

    Args:
        path: ``metrics.jsonl``; lines of steps from ``start`` on, left by a run that was cut off,
            are dropped.
        start: the first step that will be added.
        every: steps between two reads of the device.
    """

    def __init__(self, path: Path, start: int, every: int) -> None:
        self._path, self._every = path, every
        self._waiting: list[tuple[dict[str, Any], tuple[str, ...], Tensor]] = []
        self._tokens, self._since = 0, time.perf_counter()
        self.latest: dict[str, Any] = {}
        """The line of the last step that was written."""
        kept = []
        if path.exists():
            with explained("read", path):
                lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) < start]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def add(self, step: int, lr: float, num_tokens: int, report: StepReport) -> bool:
        """Take one step's report; return whether a block of lines was written."""
        numbers = torch.cat(
            [
                report.losses,
                report.weights,
                torch.stack([report.grad_norm, report.skipped]),
                report.gram.flatten(),
            ]
        )
        known = {"step": step, "lr": lr, "tokens": num_tokens}
        self._waiting.append((known, report.tasks, numbers))
        self._tokens += num_tokens
        if len(self._waiting) < self._every:
            return False
        self.flush()
        return True

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        rows = torch.stack([numbers for *_, numbers in self._waiting]).tolist()
        rate = self._tokens / (time.perf_counter() - self._since)
        lines = [
            known | _expand(tasks, row) | {"tokens_per_s": round(rate, 1)}
            for (known, tasks, _), row in zip(self._waiting, rows, strict=True)
        ]
        with explained("write", self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        self.latest = lines[-1]
        self._waiting.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what was done since the last step (an evaluation) out of the tokens a second."""
        self._tokens, self._since = 0, time.perf_counter()


def _expand(tasks: Sequence[str], row: list[float]) -> dict[str, Any]:
    """Name the numbers of one step; from the Gram matrix derive cosines and conflicts."""
    count = len(tasks)
    losses, weights = row[:count], row[count : 2 * count]
    grad_norm, skipped = row[2 * count : 2 * count + 2]
    gram = row[2 * count + 2 :]
    norms = [gram[k * count + k] ** 0.5 for k in range(count)]
    cosines = {}
    for i, j in itertools.combinations(range(count), 2):
        product = norms[i] * norms[j]
        cosine = gram[i * count + j] / product if product > 0 else 0.0
        cosines[f"{tasks[i]}/{tasks[j]}"] = cosine
    conflicts = sum(cosine < 0 for cosine in cosines.values())

    def by_task(numbers: Sequence[float]) -> dict[str, float | None]:
        return dict(zip(tasks, map(_json_number, numbers), strict=True))

    return {
        "losses": by_task(losses),
        "weights": by_task(weights),
        "cosines": cosines,
        "conflict_rate": conflicts / len(cosines) if cosines else 0.0,
        "task_grad_norms": by_task(norms),
        "grad_norm": _json_number(grad_norm),
        "skipped": int(skipped),
    }


def _json_number(value: float) -> float | None:
    """Return the value; JSON has no NaN and no infinity, they become null."""
    return value if math.isfinite(value) else None


def _step_of(line: str) -> int:
    """Return a line's step; of a line that was cut off, a number larger than any."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62
