"""Loops around DistributedDataParallel and bare process groups; each rank runs all of them."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kernels import BalancedOptimizer, PCGrad, TaskGradients, balancing

from .training import TASKS, Batch, Examples, Model, batches, digest, error, even, model, own_part

EACH = 8  # examples of a task on a rank, where all have as many
LR = 0.2


def pcgrad(parameters: Iterable[Tensor], **settings: Any) -> PCGrad:
    """Wrap momentum, which unlike Adam does not make the rounding of tiny gradients large."""
    return PCGrad(torch.optim.SGD(parameters, LR, momentum=0.9), **settings)


def cagrad(parameters: Iterable[Tensor], **settings: Any) -> BalancedOptimizer:
    """Wrap the same with another method, and balance each tensor by itself."""
    inner = torch.optim.SGD(parameters, LR, momentum=0.9)
    return BalancedOptimizer(inner, balancing.cagrad, granularity="tensor", **settings)


Make = Callable[..., BalancedOptimizer]


def backward(optimizer: BalancedOptimizer, losses: Sequence[Tensor | None], **more: Any) -> None:
    """Call the optimizer's backward pass by its name."""
    (optimizer.pc_backward if isinstance(optimizer, PCGrad) else optimizer.backward)(losses, **more)


def alone(make: Make, clip: float | None = None) -> Callable[[Model], Any]:
    """Return the reference: one process with all examples."""

    def start(own: Model) -> Callable[[Model, Batch], None]:
        optimizer = make(own.parameters(), process_group=None)

        def step(own: Model, batch: Batch) -> None:
            optimizer.zero_grad()
            backward(optimizer, own(batch))
            if clip is not None:
                nn.utils.clip_grad_norm_(own.parameters(), clip)
            optimizer.step()

        return step

    return start


def loop(
    wrap: Callable[[Model], nn.Module],
    make: Make = pcgrad,
    *,
    counts: Sequence[Sequence[int]] | None = None,
    weighted: bool = False,
    micro_batches: int = 1,
    no_sync: bool = False,
    clip: float | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train on this rank's part of the batches; compare with one process."""
    counts = even(EACH) if counts is None else counts
    sizes = [sum(own) for own in zip(*counts, strict=True)]
    own = model()
    wrapped = wrap(own)
    optimizer = make(own.parameters(), **settings)
    for batch in batches(sizes):
        optimizer.zero_grad()
        part = own_part(batch, counts)
        pieces = list(_pieces(part, micro_batches))
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            with wrapped.no_sync() if no_sync and not is_last else nullcontext():
                losses = [loss and loss / micro_batches for loss in wrapped(piece)]
                examples = [0 if one is None else len(one.targets) for one in piece]
                backward(optimizer, losses, **({"examples": examples} if weighted else {}))
        if clip is not None:
            nn.utils.clip_grad_norm_(own.parameters(), clip)
        optimizer.step()
    result = error(own, alone(make, clip), sizes)
    gradients = [p.grad is not None for p in own.unused.parameters()]
    return result | {"unused has a gradient": any(gradients)}


def _pieces(part: Sequence[Examples | None], count: int) -> Iterable[list[Examples | None]]:
    for number in range(count):
        yield [
            one and one.part(*(len(one.targets) * k // count for k in (number, number + 1)))
            for one in part
        ]


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
        pieces = list(_pieces(own_part(batch, counts), micro_batches))
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            with wrapped.no_sync() if no_sync and not is_last else nullcontext():
                there = [0 if one is None else len(one.targets) for one in piece]
                losses = _losses(task_gradients, wrapped, own, piece, there)
                losses = [loss and loss / micro_batches for loss in losses]
                backward(optimizer, losses, **({"examples": there} if weighted else {}))
        optimizer.step()
    result = error(own, alone(make), sizes)
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


def ddp(own: nn.Module, **settings: Any) -> nn.Module:
    """Wrap a model; it has a parameter that no task uses, which DDP alone would not take."""
    return DistributedDataParallel(own, **settings)


def unwrapped(own: nn.Module) -> nn.Module:
    """Train without a wrapper; the default process group is found."""
    return own


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
    return error(own, reference, sizes)


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

    return error(own, reference, sizes)


def alone_by_name() -> dict[str, Any]:
    """Train without the other ranks, which see other examples."""
    own = model()
    optimizer = pcgrad(own.parameters(), process_group=None)
    for batch in batches([EACH * dist.get_world_size()] * TASKS):
        optimizer.zero_grad()
        optimizer.pc_backward(own(own_part(batch, even(EACH))))
        optimizer.step()
    return {"digest": digest(own)}


# ---- what is refused -----------------------------------------------------------------------------


def _refused(prepare: Callable[[Model], PCGrad]) -> None:
    own = model()
    optimizer = prepare(own)
    batch = batches([EACH] * TASKS)[0]
    optimizer.pc_backward(own(batch))
    optimizer.step()


def a_step_within_no_sync() -> None:
    """Step although no gradient was exchanged."""
    own = model()
    wrapped = ddp(own)
    optimizer = pcgrad(own.parameters())
    with wrapped.no_sync():
        optimizer.pc_backward(wrapped(batches([EACH] * TASKS)[0]))
        optimizer.step()


def weights_that_differ() -> None:
    """Change one weight of one rank by one bit of it, later than the first comparison."""
    own = model()
    wrapped = ddp(own)
    optimizer = pcgrad(own.parameters(), check_ranks_every=2)
    for number, batch in enumerate(batches([EACH] * TASKS)):
        optimizer.zero_grad()
        optimizer.pc_backward(wrapped(batch))
        if number == 1 and dist.get_rank() == 1:
            own.layer.weight.detach().view(torch.int32)[0, 0] += 1 << 12
        optimizer.step()


def seeds_that_differ() -> None:
    """Draw other orders on each rank."""
    _refused(lambda own: pcgrad(ddp(own).parameters(), seed=dist.get_rank()))


def initial_weights_that_differ() -> None:
    """Train without a wrapper, which would have sent the first rank's weights."""

    def prepare(own: Model) -> PCGrad:
        with torch.no_grad():
            own.layer.bias += dist.get_rank()
        return pcgrad(own.parameters())

    _refused(prepare)


def tasks_that_differ() -> None:
    """Give another number of tasks on each rank."""
    own = model()
    optimizer = pcgrad(ddp(own).parameters())
    optimizer.pc_backward(own(batches([EACH] * TASKS)[0])[: TASKS - dist.get_rank() % 2])


def parameters_that_differ() -> None:
    """Freeze a layer on one rank alone."""
    own = model()
    own.norm.requires_grad_(dist.get_rank() == 0)
    pcgrad(own.parameters()).pc_backward(own(batches([EACH] * TASKS)[0]))


def names_that_differ() -> None:
    """Let the first losses name other tasks on each rank."""
    own = model()
    losses = dict(zip("abc", own(batches([EACH] * TASKS)[0]), strict=True))
    if dist.get_rank() == 1:
        losses = dict(reversed(losses.items()))
    pcgrad(own.parameters()).pc_backward(losses)


def losses_of_no_rank() -> None:
    """Give no loss anywhere."""
    pcgrad(model().parameters()).pc_backward([None] * TASKS)


def two_groups() -> None:
    """Wrap two parts of a model with different process groups."""
    own = model()
    other = dist.new_group(list(range(dist.get_world_size())))
    parts = [
        DistributedDataParallel(own.layer),
        DistributedDataParallel(own.norm, process_group=other),
    ]
    pcgrad(own.parameters()).pc_backward(own(batches([EACH] * TASKS)[0]))
    del parts


def fsdp1() -> None:
    """Wrap with FSDP1, which keeps the original parameters as views."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    own = FullyShardedDataParallel(model(), use_orig_params=True, device_id=torch.device("cpu"))
    pcgrad(own.parameters()).pc_backward(own(batches([EACH] * TASKS)[0]))


def zero3() -> None:
    """Mark parameters as DeepSpeed ZeRO-3 does."""
    own = model()
    for number, parameter in enumerate(own.parameters()):
        parameter.ds_id = number
    pcgrad(own.parameters()).pc_backward(own(batches([EACH] * TASKS)[0]))


def mixed_precision_of_ddp() -> None:
    """Let the wrapper cast parameters and gradients."""
    from torch.nn.parallel.distributed import _MixedPrecision

    own = model()
    wrapped = ddp(own)
    wrapped.mixed_precision = _MixedPrecision(param_dtype=torch.bfloat16)  # it needs a GPU
    pcgrad(own.parameters()).pc_backward(wrapped(batches([EACH] * TASKS)[0]))


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


def joined_ranks() -> None:
    """Train inside torch's Join."""
    from torch.distributed.algorithms.join import Join

    own = model()
    wrapped = ddp(own)
    optimizer = pcgrad(own.parameters())
    with Join([wrapped]):
        optimizer.pc_backward(wrapped(batches([EACH] * TASKS)[0]))


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
REFUSED: dict[str, Callable[[], None]] = {
    "a step within no_sync": a_step_within_no_sync,
    "weights that differ": weights_that_differ,
    "seeds that differ": seeds_that_differ,
    "initial weights that differ": initial_weights_that_differ,
    "tasks that differ": tasks_that_differ,
    "parameters that differ": parameters_that_differ,
    "names that differ": names_that_differ,
    "losses of no rank": losses_of_no_rank,
    "two groups": two_groups,
    "FSDP1": fsdp1,
    "ZeRO-3": zero3,
    "Join": joined_ranks,
    "mixed_precision of DDP": mixed_precision_of_ddp,
}
CASES: dict[str, Callable[[], Any]] = {
    **SAME_RESULT,
    **WITH_COUNTS,
    **SAME_WEIGHTS,
    **OTHERS,
    **REFUSED,
}
