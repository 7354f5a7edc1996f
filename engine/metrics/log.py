"""Write a run's metrics while it trains, and read them from the device every few steps only.

metrics.jsonl       a line a step: losses, cosines, conflict rate, …; in pieces when it is long
evaluations.jsonl   a line an evaluation: the number of steps done, dev scores
"""

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..runtime.gpu import GpuMeter
from .jsonl import StepLines
from .loggers import Logger
from .step_report import StepReport

STEPS, EVALUATIONS = "metrics.jsonl", "evaluations.jsonl"


class MetricsLog:
    """A log that collects step reports as tensors and writes them in blocks.

    Args:
        folder: the run's; lines of steps from ``start`` on, left by a run that was cut off, are
            dropped from its files.
        start: the first step that will be added.
        every: steps between two reads of the device.
        layers: names of the parameter groups whose Gram matrices the reports hold.
        layers_every: steps between two records of their cosines.
        loggers: what else gets the lines.
        gpu: sensors to read with each block, or None.
        ranks: the processes that train together; the main rank writes.
        limit: bytes from which on ``metrics.jsonl`` is put aside; 0: never.
        keep: how many of its pieces stay; 0: all.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        every: int,
        *,
        layers: Sequence[str] = (),
        layers_every: int = 0,
        loggers: Sequence[Logger] = (),
        gpu: GpuMeter | None = None,
        ranks: Ranks | None = None,
        limit: int = 0,
        keep: int = 0,
    ) -> None:
        self._steps = StepLines(folder / STEPS, limit=limit, keep=keep)
        self._evaluations = StepLines(folder / EVALUATIONS)
        self._every, self._layers, self._layers_every = every, tuple(layers), layers_every
        self._loggers, self._gpu, self._ranks = loggers, gpu, ranks or Ranks()
        self.start = start
        """The first step of this log."""
        self._waiting: list[tuple[dict[str, Any], tuple[str, ...], Tensor]] = []
        self._marks: list[torch.cuda.Event | None] = []
        self._tokens, self._since = 0, time.perf_counter()
        self.latest: dict[str, Any] = {}
        """The line of the last step that was written."""
        self.skipped: list[int] = []
        """The steps up to the last one that were skipped in a row."""
        if self._ranks.is_main:
            self._steps.cut(start)
            self._evaluations.cut(start + 1)  # an evaluation is of a number of steps done

    def add(
        self, step: int, lr: float, num_tokens: int, report: StepReport, warmup: float = 0.0
    ) -> None:
        """Take one step's report, and write a block of lines where that fills it.

        Args:
            step: its number.
            lr: its learning rate.
            num_tokens: of its batch on this rank, without padding.
            report: what the step returned.
            warmup: seconds in which it compiled or recorded; where there are any, it does not count
                in the tokens a second.
        """
        numbers = [
            report.losses,
            report.weights,
            torch.stack([report.grad_norm, report.skipped]),
            report.gram.flatten(),
        ]
        if report.layer_grams is not None and step % self._layers_every == 0:
            numbers.append(report.layer_grams.flatten())
        known = {"step": step, "lr": lr, "tokens": num_tokens}
        self._waiting.append((known, report.tasks, torch.cat(numbers)))
        self._marks.append(self._ranks.mark(report.losses.device))
        if warmup > 0:
            self._since += warmup
        else:
            self._tokens += num_tokens
        if len(self._waiting) >= self._every:
            self.flush()

    @property
    def is_written(self) -> bool:
        """Whether all that was added is written."""
        return not self._waiting

    def add_scores(self, steps_done: int, scores: Mapping[str, float]) -> None:
        """Write the dev scores after so many steps; one that is not finite as null."""
        if self._ranks.is_main:
            own = {task: _or_none(score) for task, score in scores.items()}
            line = {"step": steps_done, "split": "dev", "scores": own}
            self._evaluations.append([line])
        for logger in self._loggers:
            logger.log({"dev": scores}, steps_done)

    def flush(self) -> None:
        """Write what is waiting."""
        if not self._waiting:
            return
        tokens = torch.tensor([self._tokens, *(known["tokens"] for known, *_ in self._waiting)])
        # The hosts agree first: of a rank that is lost, gloo tells at once, and the device may
        # never come to the end of an exchange with it.
        self._ranks.sum_(tokens)
        self._ranks.wait_for(self._marks)
        of_block, *of_steps = tokens.tolist()
        # One copy from the device, whatever the lengths.
        values = iter(torch.cat([numbers for *_, numbers in self._waiting]).tolist())
        rate = of_block / (time.perf_counter() - self._since)
        lines = []
        for (known, tasks, numbers), count in zip(self._waiting, of_steps, strict=True):
            row = list(itertools.islice(values, len(numbers)))
            line = known | {"tokens": count} | _expand(tasks, self._layers, row)
            lines.append(line | {"tokens_per_s": round(rate, 1)})
        if self._gpu is not None:
            lines[-1]["gpu"] = self._gpu.read()
        if self._ranks.is_main:
            self._steps.append(lines)
        for logger, line in itertools.product(self._loggers, lines):
            logger.log(line, line["step"])
        self.latest = lines[-1]
        for line in lines:
            self.skipped = [*self.skipped, line["step"]] if line["skipped"] else []
        self._waiting.clear()
        self._marks.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (of an evaluation) from the tokens a second."""
        self._tokens, self._since = 0, time.perf_counter()

    def close(self) -> None:
        """Close the loggers; steps that wait for a block to fill are dropped."""
        for logger in self._loggers:
            logger.close()


def _expand(tasks: Sequence[str], layers: Sequence[str], row: list[float]) -> dict[str, Any]:
    """Name the numbers of one step; from the Gram matrices derive cosines and conflicts."""
    count = len(tasks)
    losses, weights = row[:count], row[count : 2 * count]
    grad_norm, skipped = row[2 * count : 2 * count + 2]
    gram, *layer_grams = _batched(row[2 * count + 2 :], count * count)
    cosines = _cosines(tasks, gram)
    conflicts = sum(cosine < 0 for cosine in cosines.values())

    def by_task(numbers: Iterable[float]) -> dict[str, float | None]:
        return dict(zip(tasks, map(_or_none, numbers), strict=True))

    line = {
        "losses": by_task(losses),
        "weights": by_task(weights),
        "cosines": cosines,
        "conflict_rate": conflicts / len(cosines) if cosines else 0.0,
        "task_grad_norms": by_task(gram[k * count + k] ** 0.5 for k in range(count)),
        "grad_norm": _or_none(grad_norm),
        "skipped": int(skipped),
    }
    if layer_grams:
        of_layers = zip(layers, layer_grams, strict=True)
        line["layer_cosines"] = {layer: _cosines(tasks, own) for layer, own in of_layers}
    return line


def _cosines(tasks: Sequence[str], gram: Sequence[float]) -> dict[str, float]:
    """Return the cosine of each pair of tasks by its name; 0 where a gradient has no direction."""
    count = len(tasks)
    cosines = {}
    for i, j in itertools.combinations(range(count), 2):
        product = (gram[i * count + i] * gram[j * count + j]) ** 0.5
        cosine = gram[i * count + j] / product if product > 0 else 0.0
        cosines[f"{tasks[i]}/{tasks[j]}"] = cosine if math.isfinite(cosine) else 0.0
    return cosines


def _batched(row: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    return (row[start : start + size] for start in range(0, len(row), size))


def _or_none(value: float) -> float | None:
    """Return the value, or None where it is not finite, as it will be read back."""
    return value if math.isfinite(value) else None
