"""An embedding table whose backward writes one gradient for each task.

    y_t = W[i_t]                                               i [T], W [N, H], y [T, H]
    dW_k[i] = sum of dy_t over the rows t of task k with i_t = i

A batch touches a few hundred of the word table's 30,522 rows.  The gradient rows are therefore
only added to, and whoever consumed them wipes what was touched (:func:`wipe_`), which spares
filling K whole tables with zeros at every step.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from .task_rows import TaskRows, TaskSegments


def _scatter_add_(table: Tensor, index: Tensor, source: Tensor) -> None:
    """``table[index[t]] += source[t]``, in an order that does not change between runs."""
    if table.is_cuda:  # index_add_ uses float atomics there; index_put_ sorts
        table.index_put_((index,), source, accumulate=True)
    else:
        table.index_add_(0, index, source)


@torch.library.custom_op("superbert::embedding_task_gradients_", mutates_args=("rows",))
def embedding_task_gradients_(
    grad_output: Tensor, index: Tensor, rows: Tensor, offsets: Sequence[int]
) -> None:
    """Add the rows of dy ``[T, H]`` of task k to ``rows[k]`` ``[N, H]`` at ``index`` ``[T]``."""
    for task, (start, end) in enumerate(pairwise(offsets)):
        _scatter_add_(rows[task], index[start:end], grad_output[start:end])


@embedding_task_gradients_.register_fake
def _(*_arguments: object) -> None:
    pass


def wipe_(rows: Tensor, index: Tensor, offsets: Sequence[int]) -> None:
    """Set the table rows that a backward pass touched back to zero.

    Args:
        rows: ``[K, N, H]``, as given to :func:`embedding`.
        index: ``[T]`` table rows of that batch.
        offsets: ``K + 1`` ascending row numbers of that batch.
    """
    for task, (start, end) in enumerate(pairwise(offsets)):
        rows[task].index_fill_(0, index[start:end], 0)


class _TaskEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, index: Tensor, weight: Tensor, rows: Tensor, offsets: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows, ctx.offsets = rows, offsets  # type: ignore[attr-defined]
        return F.embedding(index, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):  # type: ignore[no-untyped-def]
        (index,) = ctx.saved_tensors
        embedding_task_gradients_(grad_output, index, ctx.rows, ctx.offsets)
        return None, None, None, None


def embedding(
    index: Tensor,
    weight: Tensor,
    *,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor:
    """Look up ``weight[index]``; with ``rows``, the backward pass adds the K gradients there.

    Args:
        index: ``[T]``, int64.
        weight: ``[N, H]``.
        rows: ``rows.weight`` is ``[K, N, H]`` and zero before the first backward pass of a step;
            after use it is wiped with :func:`wipe_`.  ``weight.grad`` stays None.
        segments: which rows of the stream belong to which task; needed with ``rows``.
            ``accumulate`` makes no difference here, since rows are always added to.

    Returns:
        ``[T, H]``.

    Raises:
        ValueError: ``rows`` without ``segments``, or shapes of the two that disagree.
    """
    if rows is None:
        return F.embedding(index, weight)
    segments = rows.checked(segments, weight, None, index)
    return _TaskEmbedding.apply(index, weight, rows.weight, segments.offsets)  # type: ignore[no-untyped-call]
