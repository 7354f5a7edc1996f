"""What cannot be trained on several ranks, or must not go on: every rank says why in one line."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kernels import PCGrad

from .plain_loop import EACH, ddp, pcgrad
from .training import TASKS, Model, batches, model


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


def joined_ranks() -> None:
    """Train inside torch's Join."""
    from torch.distributed.algorithms.join import Join

    own = model()
    wrapped = ddp(own)
    optimizer = pcgrad(own.parameters())
    with Join([wrapped]):
        optimizer.pc_backward(wrapped(batches([EACH] * TASKS)[0]))


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
