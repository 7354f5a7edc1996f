"""Save and load a training run's state as named tensors.

    master.B, exp_avg.B, exp_avg_sq.B   weights and moments of bucket B, ``[rows, 64]`` fp32
    ema.B                               averaged weights, likewise, if the run has any
    step.NAME                           count of updates, balancing method, loss scale; flattened
    optimizer.NAME                      state of torch's optimizers by parameter; flattened
    frozen.NAME                         weights that are not trained, fp32

With shards of buckets on several ranks, these are distributed tensors of whole buckets, so that
another number of ranks can read them.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ..distributed.ranks import Ranks
from ..gradients.flat_parameters import FlatParameters
from ..gradients.layout import ALIGNMENT
from ..optim.build import Optimizer
from ..utils.errors import InputError
from ..utils.finite import all_finite
from .manifest import Place

_OPTIMIZER = "optimizer."
"""How the names of an optimizer's further tensors begin."""


class TrainingState:
    """The tensors of a run that a checkpoint keeps.

    Args:
        parameters: all weights.
        optimizer: their moments.
        step_state: what else the step remembers, by name.
        ranks: the processes that share the buckets.
        vectors: further ones ``[S]`` fp32, such as averaged weights, by name.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        optimizer: Optimizer,
        step_state: Mapping[str, Tensor],
        ranks: Ranks,
        vectors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._vectors = {"master": parameters.master, **optimizer.vectors, **vectors}
        self._whole = {"step.updates": optimizer.updates}
        self._whole |= {f"step.{name}": tensor for name, tensor in step_state.items()}
        self._frozen = {f"frozen.{name}": tensor for name, tensor in parameters.frozen.items()}
        self._mesh: DeviceMesh | None = None
        if parameters.layout.ranks > 1:
            assert ranks.checkpoint_group is not None, "ranks that share buckets are connected"
            self._mesh = DeviceMesh.from_group(ranks.checkpoint_group, "cpu")

    @property
    def places(self) -> dict[str, Place]:
        """Places of the parameters in their buckets."""
        places = {}
        for name, slot in self._parameters.slots.items():
            bucket = next(
                bucket
                for bucket in reversed(self._parameters.layout.buckets)
                if bucket.start <= slot.offset
            )
            offset = slot.offset - bucket.start
            places[name] = Place(bucket=bucket.name, offset=offset, shape=tuple(slot.shape))
        return places

    def check_places(self, checkpoint: Path, stored: Mapping[str, Place]) -> None:
        """Check a checkpoint's parameters against these.

        Raises:
            InputError: they are not the same.
        """
        own = self.places
        for name in sorted(own.keys() | stored.keys()):
            if own.get(name) != stored.get(name):
                found, expected = (
                    "not there" if place is None else f"of shape {list(place.shape)}"
                    for place in (stored.get(name), own.get(name))
                )
                raise InputError(
                    f"{checkpoint}: {name} is {found}, expected {expected}; "
                    "it belongs to another model: give another --out"
                )

    @property
    def is_finite(self) -> bool:
        """Whether weights, moments and the rest are finite numbers on this rank."""
        state = [*self._vectors.values(), *self._whole.values(), *self._frozen.values()]
        state += self._optimizer.state.values()
        return all_finite(tensor for tensor in state if tensor.is_floating_point())

    @property
    def is_valid(self) -> bool:
        """Whether training can have made it: finite, and no square or count below zero."""
        squares = [vector for name, vector in self._vectors.items() if name == "exp_avg_sq"]
        not_negative = *squares, self._whole["step.updates"]
        return self.is_finite and all(
            bool(tensor.amin() >= 0) for tensor in not_negative if tensor.numel()
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of the copy that :meth:`tensors` makes, on this rank."""
        shards = [shard for _, shard, _ in self._shards()]
        own = [*self._optimizer.state.values(), *self._whole.values(), *self._frozen.values()]
        return sum(tensor.nbytes for tensor in [*shards, *own])

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the state, on the CPU."""
        state: dict[str, Tensor] = {}
        for name, shard, num_rows in self._shards():
            local = _copy(shard)
            state[name] = local if self._mesh is None else self._share(local, num_rows, self._mesh)
        own = {_OPTIMIZER + name: tensor for name, tensor in self._optimizer.state.items()}
        for name, tensor in (self._whole | own).items():
            state[name] = _copy(tensor.reshape(-1))
        for name, tensor in self._frozen.items():
            state[name] = _copy(tensor)
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copy the state back from the tensors of :meth:`tensors`, after they were read into."""
        with torch.no_grad():
            for name, shard, _ in self._shards():
                read = state[name]
                shard.copy_(read.to_local() if isinstance(read, DTensor) else read)
            for name, tensor in (self._whole | self._frozen).items():
                tensor.copy_(state[name].view(tensor.shape))
            self._optimizer.load_state(
                {
                    name.removeprefix(_OPTIMIZER): tensor
                    for name, tensor in state.items()
                    if name.startswith(_OPTIMIZER)
                }
            )
        self._parameters.refresh_compute()

    def _shards(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield each bucket of each vector: name, shard ``[n, 64]``, and rows of all shards."""
        for kind, vector in self._vectors.items():
            for bucket, piece in zip(
                self._parameters.layout.buckets, self._parameters.own.pieces, strict=True
            ):
                used = min(max(bucket.start + bucket.used - piece.start, 0), piece.size)
                shard = vector[piece.own : piece.own + used].view(-1, ALIGNMENT)
                yield f"{kind}.{bucket.name}", shard, bucket.used // ALIGNMENT

    @staticmethod
    def _share(local: Tensor, num_rows: int, mesh: DeviceMesh) -> DTensor:
        return DTensor.from_local(
            local,
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size((num_rows, ALIGNMENT)),
            stride=(ALIGNMENT, 1),
        )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def named_weights(parameters: FlatParameters, master: Tensor) -> dict[str, Tensor]:
    """Return all weights by name, fp32: trained ones from the masters ``[P]``, frozen ones too."""
    state = parameters.frozen | dict(parameters.named_views(master))
    return {name: tensor.contiguous() for name, tensor in state.items()}
