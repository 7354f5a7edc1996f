"""Loops around FSDP2 and tensor-parallel parameters; each rank runs all of them."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from kernels import BalancedOptimizer, PCGrad, TaskGradients

from .plain_loop import EACH, LR, Make, alone, backward, cagrad, pcgrad
from .training import TASKS, Model, batches, error, even, model, own_part


def mesh() -> DeviceMesh:
    """Return all ranks in one row."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def hybrid_mesh() -> DeviceMesh:
    """Return ranks in rows that hold shards; the rows hold the same."""
    rows = dist.get_world_size() // 2
    return init_device_mesh("cpu", (rows, 2), mesh_dim_names=("replicate", "shard"))


def shard(own: Model, **settings: Any) -> Model:
    """Shard a model's layers one by one, and what is left."""
    for layer in (own.embedding, own.layer, own.norm):
        fully_shard(layer, **settings)
    fully_shard(own, **settings)
    return own


def whole(sharded: nn.Module) -> Model:
    """Return a model with all weights of a sharded one."""
    gathered = model()
    with torch.no_grad():
        for weight, own in zip(gathered.parameters(), sharded.parameters(), strict=True):
            weight.copy_(own.full_tensor() if isinstance(own, DTensor) else own)
    return gathered


def loop(
    wrap: Callable[[Model], Model],
    make: Make = pcgrad,
    *,
    counts: Sequence[Sequence[int]] | None = None,
    weighted: bool = False,
    micro_batches: int = 1,
    clip: float | None = None,
    no_sync: bool = False,
    replicated: bool = False,
) -> dict[str, Any]:
    """Train on this rank's part of the batches; compare with one process."""
    counts = even(EACH) if counts is None else counts
    sizes = [sum(own) for own in zip(*counts, strict=True)]
    if replicated:  # every rank computes with all examples
        sizes = [EACH] * TASKS
    own = wrap(model())
    optimizer = make(own.parameters())
    for batch in batches(sizes):
        optimizer.zero_grad()
        part = list(batch) if replicated else own_part(batch, counts)
        for number in range(micro_batches):
            if no_sync:
                own.set_requires_gradient_sync(number == micro_batches - 1)
            piece = [
                one.part(*(len(one.targets) * k // micro_batches for k in (number, number + 1)))
                for one in part
            ]
            losses = [loss / micro_batches for loss in own(piece)]
            examples = [len(one.targets) for one in piece]
            backward(optimizer, losses, **({"examples": examples} if weighted else {}))
        if clip is not None:
            nn.utils.clip_grad_norm_(own.parameters(), clip)
        optimizer.step()
    shapes = [tuple(p.grad.shape) for p in own.parameters() if p.grad is not None]
    assert shapes == [tuple(p.shape) for p in own.parameters() if p.grad is not None]
    gradients = [p.grad is not None for p in own.unused.parameters()]
    result = error(whole(own), alone(make, clip), batches(sizes))
    return result | {"unused has a gradient": any(gradients)}


def uneven() -> list[list[int]]:
    """Return counts of which every rank has other ones."""
    return [[2 + rank, 3, 7 - rank] for rank in range(dist.get_world_size())]


def tensor_parallel(own: Model) -> Model:
    """Split a layer's rows over the ranks, and replicate another one as a DTensor."""
    ranks = mesh()
    for module, placements in ((own.embedding, [Shard(0)]), (own.norm, None)):
        for name, weight in list(module.named_parameters()):
            sharded = nn.Parameter(distribute_tensor(weight.detach(), ranks, placements))
            setattr(module, name, sharded)
    own.embedding.register_forward_hook(lambda _module, _inputs, out: out.full_tensor())
    own.norm.register_forward_pre_hook(
        lambda _module, inputs: (DTensor.from_local(inputs[0], ranks),)
    )
    own.norm.register_forward_hook(lambda _module, _inputs, out: out.full_tensor())
    own.embedding.register_forward_pre_hook(
        lambda _module, inputs: (distribute_tensor(inputs[0], ranks),)
    )
    return own


def state() -> dict[str, Any]:
    """Save and restore in the middle: AdamW's moments are shards, the orders go on."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    def start() -> tuple[Model, PCGrad]:
        own = model()
        own.unused.requires_grad_(False)  # torch's loading wants a state for all that is trained
        shard(own)
        return own, PCGrad(torch.optim.AdamW(own.parameters(), 0.01))

    own, optimizer = start()
    made = batches([EACH * dist.get_world_size()] * TASKS)

    def step(own: Model, optimizer: BalancedOptimizer, number: int) -> None:
        optimizer.zero_grad()
        optimizer.pc_backward(own(own_part(made[number], even(EACH))))
        optimizer.step()

    step(own, optimizer, 0)
    saved = copy.deepcopy(get_state_dict(own, optimizer))
    step(own, optimizer, 1)
    other, restored = start()
    set_state_dict(other, restored, model_state_dict=saved[0], optim_state_dict=saved[1])
    step(other, restored, 1)
    pairs = zip(own.parameters(), other.parameters(), strict=True)
    return {"same": all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)}


def a_task_of_one_rank() -> None:
    """Leave a task without a loss on one rank, which would wait for the others' exchange."""
    own = shard(model())
    losses = own(batches([EACH] * TASKS)[0])
    losses[1] = losses[1] if dist.get_rank() == 0 else None
    pcgrad(own.parameters()).pc_backward(losses)


def task_gradients() -> None:
    """Collect task gradients of shards."""
    TaskGradients(shard(model()), TASKS)


def task_gradients_before() -> None:
    """Make task gradients, and shard the model then."""
    own = model()
    collected = TaskGradients(own, TASKS)
    shard(own)
    with collected.batch([EACH] * TASKS):
        own(batches([EACH] * TASKS)[0])


def weights_that_differ() -> None:
    """Change a weight of one replica, where shards are replicated."""
    own = shard(model(), mesh=hybrid_mesh())
    optimizer = pcgrad(own.parameters())
    optimizer.pc_backward(
        own(own_part(batches([EACH * dist.get_world_size()] * TASKS)[0], even(EACH)))
    )
    if dist.get_rank() == 2:
        own.layer.weight.to_local().detach()[0] += 1
    optimizer.step()


def seeds_that_differ() -> None:
    """Draw other orders on each rank, whose shards are its own."""
    own = shard(model())
    optimizer = pcgrad(own.parameters(), seed=dist.get_rank())
    optimizer.pc_backward(own(batches([EACH] * TASKS)[0]))
    optimizer.step()


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def mixed_precision() -> dict[str, Any]:
    """Compute in bfloat16; the shards and their updates are float32."""
    own = shard(model(), mp_policy=BF16)
    optimizer = PCGrad(torch.optim.SGD(own.parameters(), LR), check_ranks_every=1)
    before = [weight.clone() for weight in whole(own).parameters()]
    for batch in batches([EACH * dist.get_world_size()] * TASKS):
        optimizer.zero_grad()
        part = own_part(batch, even(EACH))
        optimizer.pc_backward([loss.float() for loss in own(part)])
        optimizer.step()
    pairs = list(zip(before, whole(own).parameters(), strict=True))
    return {
        "moved": sum(not torch.equal(a, b) for a, b in pairs),
        "finite": all(bool(b.isfinite().all()) for _, b in pairs),
        "dtypes": sorted({str(p.grad.dtype) for p in own.parameters() if p.grad is not None}),
    }


SAME_RESULT: dict[str, Callable[[], dict[str, Any]]] = {
    "FSDP2": partial(loop, shard),
    "FSDP2, CAGrad by tensor": partial(loop, shard, cagrad),
    "FSDP2, kept whole after the forward pass": partial(
        loop, partial(shard, reshard_after_forward=False)
    ),
    "FSDP2, clipping": partial(loop, shard, clip=0.3),
    "FSDP2, micro-batches": partial(loop, shard, cagrad, micro_batches=2),
    "FSDP2, micro-batches without sync": partial(
        loop, shard, cagrad, micro_batches=2, no_sync=True
    ),
    "FSDP2, uneven batches": lambda: loop(shard, counts=uneven(), weighted=True),
    "FSDP2, CPU offload": partial(
        loop, partial(shard, offload_policy=CPUOffloadPolicy(pin_memory=False))
    ),
    "HSDP": lambda: loop(partial(shard, mesh=hybrid_mesh())),
    "HSDP, CAGrad by tensor": lambda: loop(partial(shard, mesh=hybrid_mesh()), cagrad, clip=0.3),
    "tensor parallelism": partial(loop, tensor_parallel, replicated=True),
}
OTHERS = {"state": state, "mixed precision": mixed_precision}
REFUSED: dict[str, Callable[[], None]] = {
    "a task of one rank": a_task_of_one_rank,
    "TaskGradients": task_gradients,
    "TaskGradients, sharded later": task_gradients_before,
    "seeds that differ": seeds_that_differ,
}
OF_REPLICAS = {"weights that differ": weights_that_differ}
CASES: dict[str, Callable[[], Any]] = {**SAME_RESULT, **OTHERS, **REFUSED, **OF_REPLICAS}
