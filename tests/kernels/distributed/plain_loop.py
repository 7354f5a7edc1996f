"""A training loop of task losses on this rank's part of the batches, compared with one process."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kernels import BalancedOptimizer, PCGrad, balancing

from .training import Batch, Examples, Model, batches, error, even, model, own_part

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
        pieces = list(pieces_of(part, micro_batches))
        for number, piece in enumerate(pieces):
            is_last = number == len(pieces) - 1
            with wrapped.no_sync() if no_sync and not is_last else nullcontext():
                losses = [loss and loss / micro_batches for loss in wrapped(piece)]
                examples = [0 if one is None else len(one.targets) for one in piece]
                backward(optimizer, losses, **({"examples": examples} if weighted else {}))
        if clip is not None:
            nn.utils.clip_grad_norm_(own.parameters(), clip)
        optimizer.step()
    result = error(own, alone(make, clip), batches(sizes))
    gradients = [p.grad is not None for p in own.unused.parameters()]
    return result | {"unused has a gradient": any(gradients)}


def pieces_of(part: Sequence[Examples | None], count: int) -> Iterable[list[Examples | None]]:
    """Cut the examples of each task into so many micro-batches."""
    for number in range(count):
        yield [
            one and one.part(*(len(one.targets) * k // count for k in (number, number + 1)))
            for one in part
        ]


def ddp(own: nn.Module, **settings: Any) -> nn.Module:
    """Wrap a model; it has a parameter that no task uses, which DDP alone would not take."""
    return DistributedDataParallel(own, **settings)


def unwrapped(own: nn.Module) -> nn.Module:
    """Train without a wrapper; the default process group is found."""
    return own
