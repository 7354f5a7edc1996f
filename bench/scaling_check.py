"""``torchrun --nproc-per-node N -m bench.scaling_check``: compare prediction and measurement.

All ranks first take steps that exchange nothing, at the same time, so that they share the machine
as they do later; then exchanges with nothing to hide behind; and from both the prediction of
:mod:`bench.scaling` for steps that exchange gradients.  These are measured last.
"""

import itertools
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from engine.cli.common import Parser
from engine.cli.standard_output import exit_with
from engine.config import recipe as recipes
from engine.distributed.gradient_sync import MODES, NoSync
from engine.distributed.ranks import Ranks
from engine.gradients.layout import VECTORS
from engine.runs.run import begin
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.json_text import dump_json

from . import harness
from .scaling import Machine, Model, predict

_SHARE_OF_BACKWARD = 2 / 3  # of the products of a step: two of three


def measure(trainer: Trainer, steps: int) -> dict[str, float]:
    """Return seconds: of a step ``alone``, of it ``predicted`` with exchange, and ``measured``."""
    with closing(trainer.loader(0)) as loader:
        batches = list(itertools.islice(loader, steps))

    def take(number: int) -> None:
        trainer.step([batches[number]], number, 1e-5)

    sync, trainer.step.sync = trainer.step.sync, NoSync()
    alone = _seconds(take, steps)
    trainer.step.sync = sync
    latency, bandwidth = _link(trainer.parameters.rows.dtype)
    machine = Machine(
        forward=(1 - _SHARE_OF_BACKWARD) * alone,
        backward=_SHARE_OF_BACKWARD * alone,
        update=0.0,  # is part of the steps alone
        latency=latency,
        bandwidth=bandwidth,
    )
    replicated = trainer.recipe.distribute == "replicated"
    ranks = trainer.ranks.size
    of_step = predict(_model(trainer), machine, ranks, replicated=replicated, weak=True)
    return {
        "ranks": ranks,
        "alone": alone,
        "latency": latency,
        "bandwidth": bandwidth,
        "predicted": of_step.step,
        "measured": _seconds(take, steps),
    }


def _model(trainer: Trainer) -> Model:
    sizes = {bucket.name: bucket.size for bucket in trainer.parameters.layout.buckets}
    first = trainer.model.encoder_stages()[0].bucket
    late = [sizes.pop(name) for name in (first, VECTORS) if name in sizes]
    rows = trainer.parameters.rows
    return Model(
        buckets=list(sizes.values())[::-1],
        late=late,
        tasks=len(rows),
        row_bytes=rows.element_size(),
    )


def _link(dtype: torch.dtype) -> tuple[float, float]:
    """Return the latency of a hop and the bytes a second of a reduce-scatter, by two sizes."""
    ranks = dist.get_world_size()

    def reduce(count: int) -> float:
        whole, part = torch.zeros(count * ranks, dtype=dtype), torch.zeros(count, dtype=dtype)
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        return _seconds(lambda _: scatter(part, whole), 9)

    small, large = 64, 1 << 20
    latency = reduce(small) / (ranks - 1)
    moved = (ranks - 1) * large * dtype.itemsize
    return latency, moved / (reduce(large) - (ranks - 1) * latency)


def _seconds(work: Callable[[int], object], count: int) -> float:
    """Return the median time of ``work(0)`` to ``work(count - 1)``, begun together by all ranks."""
    taken = []
    for number in range(count):
        dist.barrier()
        begun = time.perf_counter()
        work(number)
        taken.append(time.perf_counter() - begun)
    return median(taken[1:])


def main() -> int:
    """Measure and print."""
    parser = Parser(prog="python -m bench.scaling_check", description=__doc__)
    parser.add_argument("--steps", type=harness.whole(2), default=15)
    parser.add_argument("--distribute", choices=MODES, default="sharded")
    options = harness.parse(parser)
    ranks, device = Ranks.from_environment(), torch.device("cpu")
    shape = ["hidden_size=256", "num_hidden_layers=4", "intermediate_size=1024", "vocab_size=8000"]
    settings = ["precision=fp32", f"distribute={options.distribute}"]
    recipe = recipes.load("demo", [*settings, *(f"encoder.{field}" for field in shape)])
    with ranks.init(device, recipe.timeout), tempfile.TemporaryDirectory() as folder:
        with ranks.main_first():
            trainer = build_trainer(begin(recipe, Path(folder) / "run"), device, ranks)
        result = measure(trainer, options.steps)
    if ranks.is_main:
        print(dump_json(result, indent=1))
        if options.json is not None:
            harness.write_json(options.json, result, replace=options.force)
    return 0


if __name__ == "__main__":
    exit_with(main)
