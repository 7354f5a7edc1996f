"""Synchronise task gradients and weights across ranks, bucket by bucket.

    NoSync           one process: nothing
    ReplicatedSync   all-reduce of the gradient rows; every rank holds and updates everything
    ShardedSync      reduce-scatter of the gradient rows; every rank updates its shard of each
                     bucket, and the new weights are all-gathered (Rajbhandari et al., "ZeRO",
                     2020, stage 2)

A bucket is sent as soon as the backward pass has finished its stage, which a hook on the stage's
input shows: the input's gradient is computed after those of the stage's parameters.  The buckets of
the encoder's first stage, and of biases and norms, which every stage adds to, are sent last.
Surgery then uses the gradients of the whole batch: the Gram matrices of the shards, K x K numbers
each, are added up.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..gradients.flat_parameters import FlatParameters
from ..gradients.layout import Bucket
from ..models.multitask import MultitaskModel

MODES = ("sharded", "replicated")

# Their names since torch 2.13; the old ones warn there.
_reduce_scatter: Callable[..., Any] = getattr(
    dist, "reduce_scatter_single", dist.reduce_scatter_tensor
)
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class NoSync:
    """One process: nothing to synchronise."""

    rank, ranks = 0, 1
    bytes_a_step = 0

    def start(self) -> None:
        """Send each bucket as the step's last backward pass completes it; before its forward."""

    def wait(self) -> None:
        """Wait until ``own.rows`` holds the gradients of all ranks."""

    def total(self, losses: Tensor, grams: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the losses ``[K]`` and Gram matrices ``[G, K, K]`` of all ranks together.

        Args:
            losses: shares of the mean losses.
            grams: of ``own.rows``, for one or several divisions into groups.
        """
        return losses, grams

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of all ranks, ``[ranks * m, …]`` of ``[m, …]``, m the same on each."""
        return rows

    def gather_params(self) -> None:
        """Update the weights that the model computes with on all ranks."""

    def gather(self, own: Tensor) -> Tensor:
        """Return the vector ``[P]`` whose shard ``own [S]`` each rank holds."""
        return own


class _BucketSync(NoSync):
    """A synchronisation that sends each bucket once its gradients are complete; a base class.

    Args:
        model: whose backward pass gets the hooks.
        parameters: with the gradient rows of the model.
    """

    def __init__(self, model: MultitaskModel, parameters: FlatParameters) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._parameters = parameters
        self._buckets = {bucket.name: bucket for bucket in parameters.layout.buckets}
        self._waiting: dict[str, Bucket] = {}
        self._works: list[dist.Work] = []
        _, *stages = model.encoder_stages()
        for stage in stages:
            stage.module.register_forward_pre_hook(self._when_entered(stage.bucket))
        within = {stage.bucket for stage in model.encoder_stages()}
        # The buckets after the encoder are complete when the backward pass enters it, heads first.
        behind = dict.fromkeys(stage.bucket for stage in reversed(model.stages()))
        self._behind = tuple(bucket for bucket in behind if bucket not in within)
        model.encoder.register_forward_hook(self._when_encoded)

    def start(self) -> None:
        """Mark all buckets as not sent."""
        self._waiting = dict(self._buckets)

    def wait(self) -> None:
        """Send the buckets that the backward pass completes last; wait for all."""
        self._send(list(self._waiting))
        for work in self._works:
            work.wait()
        self._works.clear()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All-gather rows."""
        gathered = rows.new_empty(self.ranks * len(rows), *rows.shape[1:])
        _all_gather(gathered, rows.contiguous())
        return gathered

    def _send(self, names: Iterable[str]) -> None:
        """Send those buckets that wait to be sent; outside ``start`` ... ``wait`` none does."""
        for name in names:
            bucket = self._waiting.pop(name, None)
            if bucket is not None:
                self._works += self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> list[dist.Work]:
        raise NotImplementedError

    def _when_encoded(self, _module: nn.Module, _arguments: Any, hidden: Tensor) -> None:
        self._add_hook(hidden, self._behind)

    def _when_entered(self, bucket: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, arguments: self._add_hook(arguments[0], (bucket,))

    def _add_hook(self, hidden: Tensor, buckets: Iterable[str]) -> None:
        if self._waiting and hidden.requires_grad:
            hidden.register_hook(lambda _gradient: self._send(buckets))


class ReplicatedSync(_BucketSync):
    """All-reduce; every rank computes the same update of all parameters."""

    def __init__(self, model: MultitaskModel, parameters: FlatParameters) -> None:
        super().__init__(model, parameters)
        # Of the bytes of all rows a rank sends (N - 1) / N twice, and receives as many.
        self.bytes_a_step = 2 * _share(parameters.rows, dist.get_world_size())

    def _reduce(self, bucket: Bucket) -> list[dist.Work]:
        rows = self._parameters.rows[:, bucket.columns]
        return [dist.all_reduce(row, async_op=True) for row in rows]

    def total(self, losses: Tensor, grams: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Add up the losses; the Gram matrices are of whole gradients already."""
        dist.all_reduce(losses)
        return losses, grams

    def gather_params(self) -> None:
        """Zero the gradients of table rows that only other ranks' batches looked up."""
        self._parameters.zero_sparse_rows()


class ShardedSync(_BucketSync):
    """Reduce-scatter, an update of one shard on each rank, all-gather."""

    def __init__(self, model: MultitaskModel, parameters: FlatParameters) -> None:
        super().__init__(model, parameters)
        self._pieces = dict(zip(self._buckets, parameters.own.pieces, strict=True))
        ranks = dist.get_world_size()
        self.bytes_a_step = _share(parameters.rows, ranks) + _share(parameters.compute, ranks)

    def _reduce(self, bucket: Bucket) -> list[dist.Work]:
        piece = self._pieces[bucket.name]
        own = self._parameters.own.rows[:, piece.own : piece.own + piece.size]
        rows = self._parameters.rows[:, bucket.columns]
        return [
            _reduce_scatter(shard, row, async_op=True) for shard, row in zip(own, rows, strict=True)
        ]

    def total(self, losses: Tensor, grams: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Add up all of them in one all-reduce of K + G K^2 numbers."""
        numbers = torch.cat([losses, *(gram.flatten() for gram in grams)])
        dist.all_reduce(numbers)
        losses, *totals = numbers.split([len(losses), *(gram.numel() for gram in grams)])
        return losses, [total.view_as(gram) for total, gram in zip(totals, grams, strict=True)]

    def gather_params(self) -> None:
        """All-gather the new weights."""
        self._gather_buckets(self._parameters.own.compute, self._parameters.compute)

    def gather(self, own: Tensor) -> Tensor:
        """All-gather a vector ``[S]`` to ``[P]``."""
        gathered = own.new_zeros(self._parameters.numel)
        self._gather_buckets(own, gathered)
        return gathered

    def _gather_buckets(self, own: Tensor, whole: Tensor) -> None:
        works = [
            _all_gather(
                whole[bucket.columns], own[piece.own : piece.own + piece.size], async_op=True
            )
            for bucket, piece in zip(self._buckets.values(), self._pieces.values(), strict=True)
        ]
        for work in works:
            work.wait()


def build_gradient_sync(
    mode: str, ranks: int, model: MultitaskModel, parameters: FlatParameters
) -> NoSync:
    """Build the synchronisation of ``ranks`` connected processes; ``mode`` is one of MODES."""
    if ranks == 1:
        return NoSync()
    return (ShardedSync if mode == "sharded" else ReplicatedSync)(model, parameters)


def _share(tensor: Tensor, ranks: int) -> int:
    """Return the bytes that a rank sends of a tensor that is reduce-scattered or all-gathered."""
    return tensor.nbytes * (ranks - 1) // ranks
