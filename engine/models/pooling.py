"""Inputs of a task head: hidden states, pooled vectors, pairs of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._kernels import kernels
from ..data.task_batch import Labels
from .context import RowContext
from .layers import Embedding, Linear

POOLINGS = ("cls", "mean")


class SharedLayers(NamedTuple):
    """Shared layers that heads of several tasks may use.

    A head names those that it uses (``uses`` in :class:`~engine.models.heads.Head`).

    Attributes:
        word: the word table, to which the decoder of masked LM is tied.
        pair: the layer of the features ``shared``, or None where no task takes them.
    """

    word: Embedding
    pair: Linear | None


class TaskStates(NamedTuple):
    """One task's share of an encoded batch: S sequences of T tokens.

    Attributes:
        tokens: ``[T, H]`` hidden states.
        pooled: ``[S, H]``; of two-sentence examples all first sentences, then all second ones.
        cu_seqlens: ``[S + 1]`` int32, from 0.
        max_seqlen: tokens in the longest sequence, or more.
        labels: of the batch, or None.
        seed: 0-dim int64, the dropout seed; None outside training.
        shared: layers that are not the head's own.
        row: the gradient row of this task; None when no task gradients are collected.
        num_rows: the number of gradient rows.
    """

    tokens: Tensor
    pooled: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Labels | None
    seed: Tensor | None
    shared: SharedLayers
    row: int | None
    num_rows: int

    def segments(self, count: int) -> kernels.TaskSegments | None:
        """Return the segments of ``count`` rows that are all of this task.

        Their gradients are added to gradient rows that were zeroed, since several tasks may use a
        layer one after the other.
        """
        if self.row is None:
            return None
        offsets = (0,) * (self.row + 1) + (count,) * (self.num_rows - self.row)
        return kernels.TaskSegments(offsets, accumulate=True)

    def row_context(self, count: int) -> RowContext:
        """Return the context of ``count`` rows that are all of this task, for shared layers."""
        return RowContext(segments=self.segments(count), seed=self.seed)


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """Reduce token states to one vector for each sequence.

    Args:
        hidden: ``[T, H]``.
        cu_seqlens: ``[S + 1]`` int32; an empty sequence gives zeros.
        pooling: ``"cls"`` (first token) or ``"mean"`` (over all tokens, [CLS] and [SEP] included).

    Returns:
        ``[S, H]`` in the dtype of ``hidden``; the mean is taken in fp32.
    """
    if pooling == "cls":
        first, end = cu_seqlens[:-1], cu_seqlens[1:]
        return kernels.take_rows(hidden, first.where(first < end, -1).long())
    offsets = cu_seqlens.long()
    # A sum that begins at 0, with which an empty sequence gives it and not NaN.
    mean = torch.segment_reduce(at_least_fp32(hidden), "mean", offsets=offsets, axis=0, initial=0)
    return mean.to(hidden.dtype)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return bf16 and fp16 as fp32; fp32, and the float64 of references, as they are."""
    return x.float() if x.element_size() < 4 else x
