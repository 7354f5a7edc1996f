"""Estimate the memory and the time of a run, from its tensors and a few real steps."""

import itertools
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..runtime.oom import memory_explained, smaller_batches
from ..training.trainer import Trainer

_STEPS = 3
_MIB = 1 << 20
_CALLED = {"exp_avg": "first moments", "exp_avg_sq": "second moments"}


def show_plan(console: Console, trainer: Trainer) -> None:
    """Print the resolved recipe, and the memory and time that training needs.

    The first batches are really trained on, in memory alone: nothing is written.

    Raises:
        InputError: the memory does not suffice.
    """
    console.print(trainer.run.recipe.to_toml(), highlight=False, soft_wrap=True)
    if len(trainer.run.recipe.in_phases) > 1:
        console.print("Of the first phase; the others begin with its weights.")
    table = Table("what", "needs")
    recipe = trainer.recipe
    with memory_explained(smaller_batches(recipe.batch_size, recipe.micro_batches)):
        for what, needs in _plan(trainer):
            table.add_row(what, needs)
    console.print(table)


def _plan(trainer: Trainer) -> Iterator[tuple[str, str]]:
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
    before = sum(map(_bytes, kept.values()))
    seconds, tokens, peak = _try_steps(trainer)
    if trainer.device.type == "cuda":
        yield "activations and the like, at the peak", _mebibytes(max(peak - before, 0))
        yield "GPU memory, at the peak", _mebibytes(peak)
    else:
        yield "the whole process, at the peak", _mebibytes(peak)
    yield "steps", f"{trainer.total_steps:,}, {trainer.epoch_steps:,} an epoch"
    yield "tokens a step", f"{tokens:,.0f}"
    yield "seconds a step", f"{seconds:.3g}"
    total = timedelta(seconds=round(seconds * trainer.total_steps))
    yield "time, without evaluations and warming up", str(total)


def _try_steps(trainer: Trainer) -> tuple[float, float, int]:
    """Train a few steps; return their median seconds, mean tokens, and peak memory in bytes."""
    on_gpu = trainer.device.type == "cuda"
    micro_batches, execution = trainer.recipe.micro_batches, trainer.step.execution
    seconds, tokens = [], []
    with closing(trainer.loader(0)) as loader:
        batches = (batch.to(trainer.device) for batch in loader)
        # The first step touches memory for the first time.
        steps = zip(range(1 + _STEPS), *[batches] * micro_batches, strict=False)
        for step, *batch in itertools.islice(steps, min(1 + _STEPS, trainer.total_steps)):
            start, warmed_up = time.perf_counter(), execution.warmup_seconds
            trainer.step(batch, step, trainer.lr_schedule(step))
            if on_gpu:
                torch.cuda.synchronize(trainer.device)
            warmup = execution.warmup_seconds - warmed_up
            seconds.append(time.perf_counter() - start - warmup)
            tokens.append(sum(each.num_tokens - each.padding for each in batch))
    peak = (
        torch.cuda.max_memory_allocated(trainer.device)
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return median(seconds[1:] or seconds), sum(tokens) / len(tokens), peak


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mebibytes(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
