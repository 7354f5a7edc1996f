r"""Tell the noise of task gradients from conflict, at fixed weights, while a recipe trains.

    python -m bench.balancing.noise --data DIR --init MODEL \
        --json bench/results/balancing/noise.json

At some steps of ``bench/balancing/three_tasks.toml`` the weights are held, and several batches that
were not trained on give the gradients of all tasks.  Two batches of one task show how much of a
cosine is noise: with as many examples as there are, theirs would be 1.  Larger batches are means of
the gradients of several.  From dot products of different batches, in which noise cancels, comes the
cosine of two tasks without noise, ``E[g h] / sqrt(E[g g'] E[h h'])``.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine.cli.common import Parser, run_cli
from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.runs.run import begin
from engine.runtime.cpu import set_threads
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.errors import InputError

from .. import harness

RECIPE = Path(__file__).parent / "three_tasks.toml"
_COLUMNS = 1 << 18
"""Columns that are multiplied at a time, in fp32."""


def main() -> int:
    """Run the command; return its exit status."""
    parser = Parser(prog="python -m bench.balancing.noise", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the data files; needed")
    add("--init", type=Path, metavar="DIR", help="pretrained encoder; without: random weights")
    add("--steps", type=harness.whole(0), nargs="+", default=[0, 100, 300], help="where to measure")
    add("--batches", type=harness.whole(2, 64), default=16, help="of each task, at each place")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    options = harness.parse(parser)
    places = sorted({*options.steps})
    trainer = trainer_for(options.data, options.init, options.set, places[-1] + options.batches)
    results = {"settings": options.set, "batch_size": trainer.samplers[0].batch_size}
    record = harness.Record(options, "balancing.noise", torch.device("cpu"))
    results["places"] = found = []
    for step, grams in measure(trainer, places, options.batches):
        found.append({"step": step, **describe(trainer.step.tasks, grams)})
        record.write(results)
        print(found[-1], flush=True)
    return 0


def trainer_for(
    data: Path | None, init: Path | None, settings: Sequence[str], steps: int
) -> Trainer:
    """Return the trainer of so many steps of the recipe, by the plain sum.

    Raises:
        InputError: settings or data cannot be used, or give fewer steps.
    """
    own = [f"max_steps={steps}", "balance=sum"]
    for key, folder in (("data", data), ("init", init)):
        if folder is not None:
            own.append(recipes.override(key, str(folder.absolute())))
    recipe = recipes.load(str(RECIPE), [*settings, *own])
    set_threads(recipe.threads, 1)
    trainer = build_trainer(begin(recipe, Path("not-written")), torch.device("cpu"))
    if trainer.total_steps < steps:
        raise InputError(f"--steps: data and epochs give {trainer.total_steps} steps, not {steps}")
    return trainer


def measure(trainer: Trainer, places: Sequence[int], batches: int) -> Iterator[tuple[int, Tensor]]:
    """Train, and yield each place with the dot products ``[N, K, N, K]`` fp64 of N batches there.

    The batches are the next ones, which are trained on afterwards.
    """
    with trainer.loader(0) as batches_of_run:
        loader = iter(batches_of_run)
        ahead: list[PackedBatch] = []
        for step in range(places[-1] + 1):
            if step in places:
                ahead += itertools.islice(loader, batches - len(ahead))
                yield step, _grams(trainer, step, ahead)
            if step < places[-1]:
                batch = ahead.pop(0) if ahead else next(loader)
                trainer.step(batch, step, trainer.lr_schedule(step))


def _grams(trainer: Trainer, step: int, batches: Sequence[PackedBatch]) -> Tensor:
    """Return the dot products of all gradients of the batches, without an update."""
    kept: list[Tensor] = []

    def keep(*_: Any, **__: Any) -> None:
        kept.append(trainer.parameters.rows.clone())

    with mock.patch.object(trainer.step.optimizer, "step", keep):
        for number, batch in enumerate(batches):
            trainer.step(batch, step + number, 0.0)
    rows = torch.cat(kept)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for columns in rows.split(_COLUMNS, 1):
        own = columns.float()
        gram += (own @ own.T).double()
    return gram.view(len(kept), -1, len(kept), len(kept[0]))


def describe(tasks: Sequence[str], grams: Tensor) -> dict[str, Any]:
    """Describe the dot products ``[N, K, N, K]`` of N batches of K tasks.

    Returns:
        ``norms`` of the gradient of a batch (the root of their mean square); ``noise``, the share
        of its square that is not of the mean gradient; ``true_cosines`` of the mean gradients, each
        with its standard error (by leaving out a batch at a time; both None where there is more
        noise than can be taken off); and for means of 1, 2, 4, … batches ``same_task`` and
        ``tasks``: mean and deviation of the cosines of two batches, of one task and of a pair of
        tasks.
    """
    count = len(grams)
    squares = grams.diagonal(dim1=0, dim2=2).mean(-1).diagonal()
    true_squares = _without_noise(grams).diagonal().clamp(min=0)
    pairs = [*itertools.combinations(range(len(tasks)), 2)]
    names = [f"{tasks[i]}/{tasks[j]}" for i, j in pairs]
    by_size = {}
    for size in (2**power for power in range(int(math.log2(count)))):
        own = _means(grams, size)
        within = {tasks[k]: _spread(_same(own, k)) for k in range(len(tasks))}
        across = [_spread(_pair(own, i, j)) for i, j in pairs]
        by_size[size] = {"same_task": within, "tasks": dict(zip(names, across, strict=True))}
    true = [true_cosine(grams, i, j) for i, j in pairs]
    return {
        "norms": dict(zip(tasks, squares.sqrt().tolist(), strict=True)),
        "noise": dict(zip(tasks, (1 - true_squares / squares).tolist(), strict=True)),
        "true_cosines": dict(zip(names, true, strict=True)),
        "by_batches": by_size,
    }


def true_cosine(grams: Tensor, one: int, other: int) -> dict[str, float | None]:
    """Return the cosine of two tasks' mean gradients, and its jackknife ``error``."""
    count = len(grams)
    keep = ~torch.eye(count, dtype=torch.bool)
    left = [_cosine(_without_noise(grams[rest][:, :, rest]), one, other) for rest in keep]
    values = torch.tensor([value for value in left if value is not None], dtype=torch.float64)
    mean = _cosine(_without_noise(grams), one, other)
    if mean is None or len(values) < count:
        return {"mean": None, "error": None}
    error = ((count - 1) / count * (values - values.mean()).square().sum()).sqrt().item()
    return {"mean": mean, "error": error}


def _without_noise(grams: Tensor) -> Tensor:
    """Return the mean ``[K, K]`` of the dot products of different batches."""
    count = len(grams)
    same = grams.diagonal(dim1=0, dim2=2).sum(-1)
    return (grams.sum((0, 2)) - same) / (count * (count - 1))


def _cosine(gram: Tensor, one: int, other: int) -> float | None:
    squares = gram[one, one].item(), gram[other, other].item()
    return None if min(squares) <= 0 else gram[one, other].item() / math.sqrt(math.prod(squares))


def _means(grams: Tensor, size: int) -> Tensor:
    """Return the cosines ``[M, K, M, K]`` of the means of ``size`` batches each."""
    count = len(grams) // size
    cut = grams[: count * size, :, : count * size]
    tasks = grams.shape[1]
    mean = cut.view(count, size, tasks, count, size, tasks).mean((1, 4))
    norms = mean.view(count * tasks, -1).diagonal().sqrt().view(count, tasks)
    return mean / (norms[:, :, None, None] * norms)


def _same(cosines: Tensor, task: int) -> Tensor:
    own = cosines[:, task, :, task]
    return own[torch.ones_like(own).triu(1).bool()]


def _pair(cosines: Tensor, one: int, other: int) -> Tensor:
    """Return those of the same batches, as a step logs them."""
    return cosines[:, one, :, other].diagonal()


def _spread(cosines: Tensor) -> dict[str, float]:
    deviation = cosines.std().item() if len(cosines) > 1 else 0.0
    return {"mean": cosines.mean().item(), "deviation": deviation}


if __name__ == "__main__":
    run_cli(main)
