"""Parameters of which each rank holds a shard: the DTensors of FSDP2 and tensor parallelism."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Sharding(NamedTuple):
    """How tensors lie on a mesh of ranks.

    Attributes:
        mesh: the device mesh.
        placements: of the tensors, one for each dimension of the mesh.
    """

    mesh: Any
    placements: tuple[Any, ...]

    def add_shards_(self, values: Tensor) -> Tensor:
        """Add up what each rank computed from its shards, in place."""
        for dimension, placement in enumerate(self.placements):
            if not placement.is_replicate():
                dist.all_reduce(values, group=self.mesh.get_group(dimension))
        return values

    def local_gradient(self, gradient: Any) -> Tensor:
        """Return this rank's shard of a gradient, which may lie otherwise than its parameter."""
        if tuple(gradient.placements) != self.placements:
            gradient = gradient.redistribute(self.mesh, self.placements)
        local: Tensor = gradient.to_local()
        return local

    def wrap(self, local: Tensor, like: Tensor) -> Tensor:
        """Make the sharded tensor, of the size of another, whose shard here is ``local``."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=like.shape,
            stride=like.stride(),
        )


def sharding_of(tensor: Tensor) -> Sharding | None:
    """Return how a tensor is sharded; None for a whole one.

    Raises:
        NotImplementedError: it is the sum of what the ranks hold.
    """
    # Where nobody has imported the module there are no such tensors.
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return None
    if any(placement.is_partial() for placement in tensor.placements):
        raise NotImplementedError(
            f"a parameter of shape {list(tensor.shape)} is a DTensor with placements "
            f"{tensor.placements}; only Shard and Replicate have task gradients"
        )
    return Sharding(tensor.device_mesh, tuple(tensor.placements))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, or the tensor itself if it is whole."""
    if sharding_of(tensor) is None:
        return tensor
    shard: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return shard


def are_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any of some tensors is sharded."""
    return any(sharding_of(tensor) is not None for tensor in tensors)


def coordinates(sharding: Sharding) -> list[int]:
    """Return this rank's place on the dimensions of the mesh that tensors are sharded over."""
    place = sharding.mesh.get_coordinate()
    return [
        number
        for number, placement in zip(place, sharding.placements, strict=True)
        if not placement.is_replicate()
    ]
