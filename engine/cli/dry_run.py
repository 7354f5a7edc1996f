"""Estimate the memory and the time of a run, from its tensors and a few real steps."""

import itertools
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..runtime.oom import memory_explained
from ..training.batch_sizes import smaller_batches
from ..training.memory_parts import MemoryMeter
from ..training.trainer import Trainer
from ..utils.memory import peak_resident_memory

_STEPS = 3
_MIB = 1 << 20
_CALLED = {"exp_avg": "first moments", "exp_avg_sq": "second moments"}


def show_plan(console: Console, trainer: Trainer, meter: MemoryMeter) -> None:
    """Print the resolved recipe, and the memory and time that training needs.

    The first batches are really trained on, in memory alone: nothing is written.  The parts of the
    memory are those of :mod:`~engine.training.memory_parts`.

    Args:
        console: to print to.
        trainer: of the first phase.
        meter: made before the trainer was built.

    Raises:
        InputError: the memory does not suffice.
    """
    console.print(trainer.run.recipe.to_toml(), highlight=False, soft_wrap=True)
    if len(trainer.run.recipe.in_phases) > 1:
        console.print("Of the first phase; the others begin with its weights.")
    table = Table("what", "needs")
    with memory_explained(smaller_batches(trainer.recipe, trainer.samplers)):
        for what, needs in _plan(trainer, meter):
            table.add_row(what, needs)
    console.print(table)


def _plan(trainer: Trainer, meter: MemoryMeter) -> Iterator[tuple[str, str]]:
    kept = {
        "weights, fp32": trainer.parameters.own.master,
        "task gradients": trainer.parameters.rows,
    }
    vectors = trainer.optimizer.vectors
    kept |= {_CALLED.get(name, name): vector for name, vector in vectors.items()}
    if trainer.step.average is not None:
        kept["averaged weights"] = trainer.step.average.weights
    if trainer.parameters.compute.data_ptr() != trainer.parameters.own.master.data_ptr():
        kept["weights to compute with"] = trainer.parameters.compute
    for what, tensor in kept.items():
        yield f"{what} {list(tensor.shape)}", _mebibytes(_bytes(tensor))
    seconds, tokens = _try_steps(trainer, meter)
    yield from _memory(meter, trainer)
    yield "steps", f"{trainer.total_steps:,}, {trainer.epoch_steps:,} an epoch"
    yield "tokens a step", f"{tokens:,.0f}"
    yield "seconds a step", f"{seconds:.3g}"
    total = timedelta(seconds=round(seconds * trainer.total_steps))
    yield "time, without evaluations and warming up", str(total)


def _memory(meter: MemoryMeter, trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield the parts of the memory and their sums, and what the system saw of the steps."""
    parts = meter.predict(trainer)
    mapped = _mebibytes(parts.mapped_rows)
    yield "the process itself, and libraries", _mebibytes(parts.process)
    yield "weights, with copies", _mebibytes(parts.weights)
    yield "gradients", _mebibytes(parts.gradients)
    yield "moments", _mebibytes(parts.moments)
    yield (
        f"rows of the data ({mapped} from files, which the system can drop)",
        _mebibytes(parts.rows),
    )
    yield "activations of the largest batch", _mebibytes(parts.activations)
    yield "evaluation", _mebibytes(parts.evaluation)
    yield "copy for a checkpoint", _mebibytes(parts.checkpoint)
    peak = _mebibytes(peak_resident_memory())
    if trainer.device.type == "cuda":
        yield "sum on the GPU (activations or evaluation)", _mebibytes(parts.on_device)
        yield "sum on the host", _mebibytes(parts.on_host)
        allocated, _ = meter.note_gpu_peaks()
        yield "GPU memory, at the peak of these steps", _mebibytes(allocated)
    else:
        yield "sum (activations or evaluation)", _mebibytes(parts.total)
    yield "the whole process, at the peak of these steps", peak


def _try_steps(trainer: Trainer, meter: MemoryMeter) -> tuple[float, float]:
    """Train a few steps; return their median seconds and mean tokens."""
    on_gpu = trainer.device.type == "cuda"
    micro_batches, execution = trainer.recipe.micro_batches, trainer.step.execution
    seconds, tokens = [], []
    with closing(trainer.loader(0)) as loader:
        batches = (batch.to(trainer.device) for batch in loader)
        # The first step touches memory for the first time.
        steps = zip(range(1 + _STEPS), *[batches] * micro_batches, strict=False)
        for step, *batch in itertools.islice(steps, min(1 + _STEPS, trainer.total_steps)):
            start, warmed_up = time.perf_counter(), execution.warmup_seconds
            with meter.step(trainer, batch):
                trainer.step(batch, step, trainer.lr_schedule(step))
            if on_gpu:
                torch.cuda.synchronize(trainer.device)
            warmup = execution.warmup_seconds - warmed_up
            seconds.append(time.perf_counter() - start - warmup)
            tokens.append(sum(each.num_tokens - each.padding for each in batch))
    return median(seconds[1:] or seconds), sum(tokens) / len(tokens)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mebibytes(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
