"""Estimate what a run needs: the memory of what it keeps, and time by a few real steps."""

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


def show_plan(console: Console, training: Trainer) -> None:
    """Print the resolved recipe, and the memory and time that training needs.

    The first batches are really trained on, in memory alone: nothing is written.

    Raises:
        InputError: the memory does not suffice.
    """
    console.print(training.run.recipe.to_toml(), highlight=False, soft_wrap=True)
    if len(training.run.recipe.in_phases) > 1:
        console.print("Of the first phase; the others begin with its weights.")
    table = Table("what", "needs")
    recipe = training.recipe
    with memory_explained(smaller_batches(recipe.batch_size, recipe.micro_batches)):
        for what, needs in _plan(training):
            table.add_row(what, needs)
    console.print(table)


def _plan(training: Trainer) -> Iterator[tuple[str, str]]:
    kept = {
        "weights, fp32": training.parameters.own.master,
        "task gradients": training.parameters.rows,
        "first moments": training.optimizer.exp_avg,
        "second moments": training.optimizer.exp_avg_sq,
    }
    if training.parameters.compute.data_ptr() != training.parameters.own.master.data_ptr():
        kept["weights to compute with"] = training.parameters.compute
    for what, tensor in kept.items():
        yield f"{what} {list(tensor.shape)}", _mebibytes(_bytes(tensor))
    before = sum(map(_bytes, kept.values()))
    seconds, tokens, peak = _try_steps(training)
    if training.device.type == "cuda":
        yield "activations and the like, at the peak", _mebibytes(max(peak - before, 0))
        yield "GPU memory, at the peak", _mebibytes(peak)
    else:
        yield "the whole process, at the peak", _mebibytes(peak)
    yield "steps", f"{training.total_steps:,}, {training.epoch_steps:,} an epoch"
    yield "tokens a step", f"{tokens:,.0f}"
    yield "seconds a step", f"{seconds:.3g}"
    whole = timedelta(seconds=round(seconds * training.total_steps))
    yield "time, without evaluations and warming up", str(whole)


def _try_steps(training: Trainer) -> tuple[float, float, int]:
    """Train a few steps; return their median seconds, mean tokens, and peak memory in bytes."""
    on_gpu = training.device.type == "cuda"
    parts, execution = training.recipe.micro_batches, training.step.execution
    seconds, tokens = [], []
    with closing(training.loader(0)) as loader:
        batches = (batch.to(training.device) for batch in loader)
        # The first step touches memory for the first time.
        steps = zip(range(1 + _STEPS), *[batches] * parts, strict=False)
        for step, *batch in itertools.islice(steps, min(1 + _STEPS, training.total_steps)):
            start, warmed_up = time.perf_counter(), execution.warmup_seconds
            training.step(batch, step, training.schedule(step))
            if on_gpu:
                torch.cuda.synchronize(training.device)
            warmup = execution.warmup_seconds - warmed_up
            seconds.append(time.perf_counter() - start - warmup)
            tokens.append(sum(part.num_tokens - part.padding for part in batch))
    peak = (
        torch.cuda.max_memory_allocated(training.device)
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return median(seconds[1:] or seconds), sum(tokens) / len(tokens), peak


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _mebibytes(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
