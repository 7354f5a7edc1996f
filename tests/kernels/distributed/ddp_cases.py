"""Loops around DistributedDataParallel and bare process groups; each rank runs all of them."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels import BalancedOptimizer, PCGrad, TaskGradients

from .ddp_refusals import REFUSED
from .plain_loop import (
    EACH,
    LR,
    Make,
    alone,
    backward,
    cagrad,
    ddp,
    loop,
    pcgrad,
    pieces_of,
    unwrapped,
)
from .training import TASKS, Batch, Examples, Model, batches, digest, error, even, model, own_part


class _Recomputed(torch.autograd.Function):
    """Runs a layer without its graph, and again, forward and backward, in the backward pass."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x, weight, bias)
        return layer(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            out = ctx.layer(ctx.saved_tensors[0])
        return None, *torch.autograd.grad(out, ctx.saved_tensors, grad)


class _RecomputedLayer(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return _Recomputed.apply(self.layer, x, self.layer.weight, self.layer.bias)


def recomputing(own: Model) -> nn.Module:
    """Wrap a model whose backward pass runs another one within, for the same parameters."""
    own.layer = _RecomputedLayer(own.layer)
    return ddp(own)


def compiled(own: nn.Module) -> nn.Module:
    """Wrap a model, and let torch.compile trace it."""
    return torch.compile(ddp(own), backend="aot_eager")


# ---- one backward pass for all tasks -------------------------------------------------------------


class Joined(nn.Module):
    """Computes the hidden states of all tasks' examples at once."""

    def __init__(self, inner: Model) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, FEATURES]``."""
        return self.inner.hidden(tokens)


def collected(
    wrap: Callable[[nn.Module], nn.Module],
    make: Make = pcgrad,
    *,
    counts: Sequence[Sequence[int]] | None = None,
    weighted: bool = False,
    micro_batches: int = 1,
    no_sync: bool = False,
) -> dict[str, Any]:
    """Train with TaskGradients; compare with one process and a backward pass for each task."""
    counts = even(EACH) if counts is None else counts
    sizes = [sum(own) for own in zip(*counts, strict=True)]
    own = model()
    joined = Joined(own)
    task_gradients = TaskGradients(joined, TASKS)
    wrapped = wrap(joined)
    optimizer = make(own.parameters(), task_gradients=task_gradients)
    for batch in batches(sizes):
        optimizer.zero_grad()
        pieces = list(pieces_of(own_part(batch, counts), micro_batches))
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            with wrapped.no_sync() if no_sync and not is_last else nullcontext():
                there = [0 if one is None else len(one.targets) for one in piece]
                losses = _losses(task_gradients, wrapped, own, piece, there)
                losses = [loss and loss / micro_batches for loss in losses]
                backward(optimizer, losses, **({"examples": there} if weighted else {}))
        optimizer.step()
    result = error(own, alone(make), batches(sizes))
    gradients = [p.grad is not None for p in own.unused.parameters()]
    return result | {"unused has a gradient": any(gradients)}


def _losses(
    task_gradients: TaskGradients,
    wrapped: nn.Module,
    own: Model,
    part: Sequence[Examples | None],
    there: Sequence[int],
) -> list[Tensor | None]:
    losses: list[Tensor | None] = []
    with task_gradients.batch(there):
        tokens = [one.tokens for one in part if one is not None]
        hidden = wrapped(torch.cat(tokens)).split(list(there))
        for task, (states, one) in enumerate(zip(hidden, part, strict=True)):
            with task_gradients.task(task):
                out = own.heads[task](states)[:, 0]
            losses.append(None if one is None else (out - one.targets).square().mean())
    return losses


def averaged_rows() -> dict[str, Any]:
    """Collect rows without an optimizer; the last rank has no example of task 1."""
    counts = even(EACH)
    counts[-1][1] = 0
    own = model()
    task_gradients = TaskGradients(own, TASKS)
    part = own_part(batches([sum(c) for c in zip(*counts, strict=True)])[0], counts)
    there = [0 if one is None else len(one.targets) for one in part]
    losses = _losses(task_gradients, Joined(own), own, part, there)
    sum(loss for loss in losses if loss is not None).backward()
    rows = [torch.empty_like(task_gradients.rows) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, task_gradients.rows)
    task_gradients.average_over_ranks()
    wanted = torch.stack(rows).double().mean(0)
    reached = [sorted(task_gradients.tasks_reaching(head.weight)) for head in own.heads]
    error = float((task_gradients.rows - wanted).abs().max() / wanted.abs().max())
    return {"error": error, "reached": reached}


# ---- the cases -----------------------------------------------------------------------------------


def uneven() -> list[list[int]]:
    """Return counts of which every rank has other ones, and the last one none of task 1."""
    ranks = dist.get_world_size()
    return [[2 + rank, (ranks - 1 - rank) * 3, 5] for rank in range(ranks)]


def absent() -> list[list[int]]:
    """Return counts where the first rank has no example of task 2, the last one none at all."""
    counts = even(EACH)
    counts[0][2] = 0
    counts[-1] = [0] * TASKS
    return counts


def by_two_optimizers() -> dict[str, Any]:
    """Give the heads, within the same wrapper, an optimizer of their own."""

    def optimizers(own: Model, **settings: Any) -> tuple[PCGrad, torch.optim.Optimizer]:
        heads = [*own.heads.parameters(), *own.unused.parameters()]
        of_heads = {id(parameter) for parameter in heads}
        shared = [p for p in own.parameters() if id(p) not in of_heads]
        return pcgrad(shared, **settings), torch.optim.SGD(heads, LR)

    def step(both: tuple[Any, ...], losses: Sequence[Tensor | None]) -> None:
        for one in both:
            one.zero_grad()
        both[0].pc_backward(losses)
        for one in both:
            one.step()

    def reference(own: Model) -> Callable[[Model, Batch], None]:
        both = optimizers(own, process_group=None)
        return lambda own, batch: step(both, own(batch))

    own = model()
    wrapped = ddp(own)
    both = optimizers(own)
    sizes = [EACH * dist.get_world_size()] * TASKS
    for batch in batches(sizes):
        step(both, wrapped(own_part(batch, even(EACH))))
    return error(own, reference, batches(sizes))


def adamw_in_autocast() -> dict[str, Any]:
    """Train in bfloat16 with AdamW; the ranks' weights are compared bit by bit."""
    own = model()
    wrapped = ddp(own)
    optimizer = PCGrad(torch.optim.AdamW(own.parameters(), 0.01), check_ranks_every=1)
    for batch in batches([EACH * dist.get_world_size()] * TASKS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            losses = wrapped(own_part(batch, even(EACH)))
        optimizer.pc_backward(losses)
        optimizer.step()
    return {"digest": digest(own)}


def overflow_on_one_rank() -> dict[str, Any]:
    """Let one rank's gradient overflow under a loss scale: all ranks skip the step."""
    own = model()
    wrapped = ddp(own)
    optimizer = pcgrad(own.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = digest(own)
    scales = []
    for number, batch in enumerate(batches([EACH * dist.get_world_size()] * TASKS)):
        optimizer.zero_grad()
        losses = [scaler.scale(loss) for loss in wrapped(own_part(batch, even(EACH)))]
        if number == 0 and dist.get_rank() == 1:
            losses[1] = losses[1] * torch.inf
        optimizer.pc_backward(losses)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if number == 0:
            assert digest(own) == before
    return {"digest": digest(own), "scales": scales}


def other_methods_on_ranks() -> dict[str, Any]:
    """Draw weights at random on each rank, and another order: the first rank's are used."""
    torch.manual_seed(dist.get_rank())
    own = model()
    torch.manual_seed(dist.get_rank())
    wrapped = ddp(own)
    inner = torch.optim.SGD(own.parameters(), LR)
    optimizer = BalancedOptimizer(inner, lambda gram: torch.rand(len(gram)), check_ranks_every=1)
    for batch in batches([EACH * dist.get_world_size()] * TASKS):
        optimizer.zero_grad()
        optimizer.backward(wrapped(own_part(batch, even(EACH))))
        optimizer.step()
    return {"digest": digest(own)}


def buffers() -> dict[str, Any]:
    """Let ranks' buffers differ: the wrapper sends the first rank's ones before a forward pass."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, batch: Sequence[Examples | None]) -> list[Tensor | None]:
            seen.append(float(self.count))
            self.count += 1 + dist.get_rank()
            return self.inner(batch)

    seen: list[float] = []
    counting = Counting()
    wrapped = ddp(counting)
    optimizer = pcgrad(counting.parameters())
    for batch in batches([EACH * dist.get_world_size()] * TASKS):
        optimizer.zero_grad()
        optimizer.pc_backward(wrapped(own_part(batch, even(EACH))))
        optimizer.step()
    return {"seen": seen}


def backward_of_the_wrapper_between() -> dict[str, Any]:
    """Do ordinary steps of the wrapper between those of PCGrad: it averages as before."""
    own = model()
    own.unused.requires_grad_(False)
    wrapped = ddp(own)
    optimizer = pcgrad(own.parameters())
    sizes = [EACH * dist.get_world_size()] * TASKS
    for number, batch in enumerate(batches(sizes)):
        optimizer.zero_grad()
        losses = wrapped(own_part(batch, even(EACH)))
        if number % 2:
            optimizer.pc_backward(losses)
            optimizer.step()
        else:
            sum(losses).backward()
            optimizer.optimizer.step()

    def reference(own: Model) -> Callable[[Model, Batch], None]:
        alone = pcgrad(own.parameters(), process_group=None)
        numbers = iter(range(99))

        def step(own: Model, batch: Batch) -> None:
            alone.zero_grad()
            if next(numbers) % 2:
                alone.pc_backward(own(batch))
                alone.step()
            else:
                sum(own(batch)).backward()
                alone.optimizer.step()

        return step

    return error(own, reference, batches(sizes))


def alone_by_name() -> dict[str, Any]:
    """Train without the other ranks, which see other examples."""
    own = model()
    optimizer = pcgrad(own.parameters(), process_group=None)
    for batch in batches([EACH * dist.get_world_size()] * TASKS):
        optimizer.zero_grad()
        optimizer.pc_backward(own(own_part(batch, even(EACH))))
        optimizer.step()
    return {"digest": digest(own)}


def communication_hook() -> dict[str, Any]:
    """Register a hook that averages in the wrapper's place."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    own = model()
    wrapped = ddp(own)
    wrapped.register_comm_hook(None, allreduce_hook)
    optimizer = pcgrad(own.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches([EACH * dist.get_world_size()] * TASKS):
            optimizer.zero_grad()
            optimizer.pc_backward(wrapped(own_part(batch, even(EACH))))
            optimizer.step()
    said = [w for w in caught if "communication hooks" in str(w.message)]
    return {"said": len(said), "here": all(w.filename == __file__ for w in said)}


SAME_RESULT: dict[str, Callable[[], dict[str, Any]]] = {
    "DDP": partial(loop, ddp),
    "DDP, find_unused_parameters": partial(loop, partial(ddp, find_unused_parameters=True)),
    "DDP, static_graph": partial(loop, partial(ddp, static_graph=True)),
    "DDP, gradient_as_bucket_view": partial(loop, partial(ddp, gradient_as_bucket_view=True)),
    "DDP, a backward pass within": partial(loop, recomputing),
    # One graph of all losses counts its parameters as reached by all of them, as a mean divides by.
    "DDP, torch.compile": partial(loop, compiled, partial(pcgrad, reduction="sum")),
    "process group": partial(loop, unwrapped),
    "DDP, CAGrad by tensor": partial(loop, ddp, cagrad),
    "DDP, sum, by group": partial(loop, ddp, partial(pcgrad, reduction="sum", granularity="group")),
    "DDP, clipping": partial(loop, ddp, clip=0.3),
    "DDP, micro-batches": partial(loop, ddp, cagrad, micro_batches=2),
    "DDP, no_sync": partial(loop, ddp, micro_batches=2, no_sync=True),
    "DDP, CAGrad, no_sync": partial(loop, ddp, cagrad, micro_batches=4, no_sync=True),
    "TaskGradients, DDP": partial(collected, ddp),
    "TaskGradients, DDP, find_unused_parameters": partial(
        collected, partial(ddp, find_unused_parameters=True)
    ),
    "TaskGradients, DDP, static_graph": partial(collected, partial(ddp, static_graph=True)),
    "TaskGradients, process group": partial(collected, unwrapped, cagrad),
    "TaskGradients, no_sync": partial(collected, ddp, micro_batches=2, no_sync=True),
    "TaskGradients, micro-batches": partial(collected, ddp, cagrad, micro_batches=2),
    "two optimizers": by_two_optimizers,
    "ordinary steps between": backward_of_the_wrapper_between,
}
WITH_COUNTS = {
    "uneven batches": lambda: loop(ddp, counts=uneven(), weighted=True),
    "absent tasks": lambda: loop(ddp, counts=absent()),
    "absent tasks, no_sync": lambda: loop(ddp, counts=absent(), micro_batches=2, no_sync=True),
    "TaskGradients, uneven batches": lambda: collected(ddp, counts=uneven(), weighted=True),
}
SAME_WEIGHTS = {
    "AdamW in autocast": adamw_in_autocast,
    "overflow on one rank": overflow_on_one_rank,
    "methods drawn at random": other_methods_on_ranks,
}
OTHERS = {
    "averaged rows": averaged_rows,
    "buffers": buffers,
    "process_group=None": alone_by_name,
    "communication hook": communication_hook,
}
CASES: dict[str, Callable[[], Any]] = {
    **SAME_RESULT,
    **WITH_COUNTS,
    **SAME_WEIGHTS,
    **OTHERS,
    **REFUSED,
}
