"""Store each parameter's offset in the flat vector, and each rank's shard of the vector.

Each parameter starts at a multiple of 64 elements; gaps hold zeros everywhere and stay zero.
Matrices, which weight decay acts on, come first, then biases and norms: ``[0, decayed)`` decays.

Neighbouring parameters form buckets, in the order of the forward pass: embeddings, each layer,
heads; a backward pass completes the last ones first.  Biases and norms are the last bucket.  With N
ranks a bucket is padded so that each rank owns an equal shard of it, rank n the n-th.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .._kernels import kernels

ALIGNMENT = kernels.gradient_buffer.ALIGNMENT

Slot = kernels.gradient_buffer.Slot

VECTORS = "vectors"
"""The bucket of biases and norms."""


class Bucket(NamedTuple):
    """Neighbouring columns that are sent together.

    Attributes:
        name: ``encoder.embeddings``, ``encoder.layers.0``, ..., ``heads``, ..., ``vectors``.
        start: the first column.
        used: columns that hold parameters, a multiple of :data:`ALIGNMENT`.
        size: columns with the padding, a multiple of ALIGNMENT times the ranks.
    """

    name: str
    start: int
    used: int
    size: int

    @property
    def columns(self) -> slice:
        """All columns."""
        return slice(self.start, self.start + self.size)


class Piece(NamedTuple):
    """Neighbouring columns of a rank's shard.

    Attributes:
        start: the first column in the whole vector.
        own: the first column in the shard.
        size: the number of columns.
    """

    start: int
    own: int
    size: int


class Layout:
    """The offsets of named parameters.

    Args:
        shapes: of the parameters, by name, in the model's order.
        bucket_names: the bucket of each matrix: gradients that a backward pass completes together.
        ranks: the number of ranks that the buckets are divided among.

    Attributes:
        slots: the columns of each parameter, by name.
        buckets: all buckets, without gaps between them.
        decayed: columns before this one belong to matrices.
        numel: P, all columns.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], bucket_names: Mapping[str, str], ranks: int = 1
    ) -> None:
        self.ranks = ranks
        self.slots: dict[str, Slot] = {}
        self.buckets: list[Bucket] = []
        matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
        by_bucket: dict[str, dict[str, torch.Size]] = {}
        for name, shape in matrices.items():
            by_bucket.setdefault(bucket_names[name], {})[name] = shape
        end = 0
        for bucket, members in by_bucket.items():
            end = self._place(bucket, members, end)
        self.decayed = end
        vectors = {name: shape for name, shape in shapes.items() if len(shape) <= 1}
        self.numel = self._place(VECTORS, vectors, end)

    def pieces(self, rank: int) -> list[Piece]:
        """Return the shard of ``rank``: one piece of each bucket, in the order of the buckets."""
        pieces, own = [], 0
        for bucket in self.buckets:
            size = bucket.size // self.ranks
            pieces.append(Piece(bucket.start + rank * size, own, size))
            own += size
        return pieces

    def named_views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and its view of ``flat [..., P]``."""
        for name, slot in self.slots.items():
            yield name, slot.view(flat)

    def _place(self, bucket: str, members: Mapping[str, torch.Size], start: int) -> int:
        slots, end = kernels.gradient_buffer.lay_out(members, start)
        self.slots |= {slot.name: slot for slot in slots}
        size = kernels.gradient_buffer.round_up(end - start, ALIGNMENT * self.ranks)
        if size:
            self.buckets.append(Bucket(bucket, start, end - start, size))
        return start + size
