"""An embedding table whose backward writes one gradient for each task.

    y_t = W[i_t]                                               i [T], W [N, H], y [T, H]
    dW_k[i] = sum of dy_t over the rows t of task k with i_t = i

A batch looks up a few hundred of the word table's 30,522 rows.  So a backward pass adds to the
gradients of these rows alone, and the caller zeroes them after the step (:func:`zero_rows_`),
instead of K whole tables.  :mod:`~kernels.embedding.lookup_plan` sorts them beforehand.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from .. import _extension  # noqa: F401  (registers the operator)
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.differentiation import differentiable_once, refuse_transforms
from ..registration.validation import check_data
from ..task_rows import TaskRows, TaskSegments, rows_at
from .embedding_checks import check_embedding_gradients
from .lookup_plan import LookupPlan, add_planned_gradients_

# ---- reference ----------------------------------------------------------------------------------


def embedding_task_gradients_reference_(
    grad_output: Tensor, index: Tensor, rows: Tensor, offsets: Sequence[int]
) -> None:
    """Add the rows of dy ``[T, H]`` of task k to ``rows[k]`` ``[N, H]`` at ``index [T]``."""
    for task, (start, end) in enumerate(pairwise(offsets)):
        rows[task].index_put_((index[start:end],), grad_output[start:end], accumulate=True)


# ---- registration -------------------------------------------------------------------------------


def _fake(*_arguments: object) -> None:
    pass


@register_cuda("embedding_task_gradients_")
def _cuda(*arguments: Any) -> None:
    from . import embedding_triton

    check_embedding_gradients(*arguments)
    embedding_triton.add_task_gradients_(*arguments)


register_fake("embedding_task_gradients_")(_fake)
declare("embedding_task_gradients_", cpu="cpp", cuda="triton")


def embedding_task_gradients_(
    grad_output: Tensor, index: Tensor, rows: Tensor, offsets: Sequence[int]
) -> None:
    """Add to the rows of K tables; the sums are computed in float32, in the order of the stream.

    Args:
        grad_output: dy ``[T, H]``.
        index: ``[T]`` int64, which table rows were looked up.
        rows: ``[K, N, H]``, added to; any stride between the tables.
        offsets: ``K + 1`` ascending row numbers of the stream.
    """
    if rows.dtype == torch.float64:
        check_data(grad_output=grad_output, index=index, rows=rows)
        embedding_task_gradients_reference_(grad_output, index, rows, offsets)
    else:
        check_data(index=index)
        index = index.contiguous()
        torch.ops.superbert.embedding_task_gradients_(grad_output, index, rows, offsets)


# ---- public -------------------------------------------------------------------------------------


def zero_rows_(rows: Tensor, index: Tensor, offsets: Sequence[int]) -> None:
    """Zero the gradients of the table rows that a backward pass added to.

    Args:
        rows: ``[K, N, H]``, any dtype, as given to :func:`embedding`.
        index: ``[T]`` int64, table rows of that batch.
        offsets: ``K + 1`` ascending row numbers of that batch.

    Raises:
        ValueError: a storage that was freed.
    """
    check_data(rows=rows, index=index)
    for task, (start, end) in enumerate(pairwise(offsets)):
        rows[task].index_fill_(0, index[start:end], 0)


class _TaskEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        index: Tensor,
        weight: Tensor,
        buffer: Tensor,
        start: int,
        offsets: tuple[int, ...],
        plan: Tensor | None,
        planned_before: tuple[int, ...],
        planned_after: tuple[int, ...],
    ) -> Tensor:
        if plan is None:
            ctx.save_for_backward(index, weight)
        else:
            ctx.save_for_backward(plan)
        ctx.rows, ctx.offsets = (buffer, start), offsets  # type: ignore[attr-defined]
        # Of this table and the others: torch.compile loses an argument that a tensor has as a size.
        planned = (planned_before, weight.shape[0], planned_after)
        ctx.planned = planned  # type: ignore[attr-defined]
        return F.embedding(index, weight)

    @staticmethod
    @differentiable_once("embedding with task rows", "the layer without rows")
    def backward(ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor) -> tuple[None, ...]:
        buffer, start = ctx.rows
        if len(saved) == 1:
            before, own, after = ctx.planned
            numbers = ((*before, own, *after), ctx.offsets, len(before))
            add_planned_gradients_(grad_output, saved[0], buffer, *numbers)
        else:
            index, weight = saved
            rows = rows_at(buffer, start, weight.shape)
            embedding_task_gradients_(grad_output, index, rows, ctx.offsets)
        return (None,) * 8


def embedding(
    index: Tensor,
    weight: Tensor,
    *,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
    plan: LookupPlan | None = None,
) -> Tensor:
    """Look up ``weight[index]``; with ``rows``, the backward pass adds the K gradients there.

    Args:
        index: ``[T]``, int64.
        weight: ``[N, H]``, any floating dtype.
        rows: ``rows.weight`` ``[K, N, H]`` is zero before the first backward pass of a step;
            zero it after use with :func:`zero_rows_`.  ``weight.grad`` stays None.
        segments: which rows of the stream belong to which task; needed with ``rows``.
            ``accumulate`` makes no difference here, since rows are always added to.
        plan: of this index, by `kernels.plan_lookups` for the columns of ``rows`` and maybe more;
            on a GPU the backward pass then need not sort.  The gradients are the same.

    Returns:
        ``[T, H]`` in the dtype of ``weight``.

    Raises:
        ValueError: ``rows`` without ``segments``, shapes of the two that disagree, a plan of other
            tables, or a storage that was freed.
    """
    check_data(index=index, weight=weight)
    if rows is None:
        if plan is not None:
            raise ValueError("plan: of no use without rows")
        return F.embedding(index, weight)
    if index.dim() != 1:
        raise ValueError(f"rows: task gradients need an index [T], got {list(index.shape)}")
    refuse_transforms("embedding", weight)
    segments = rows.checked(segments, weight, None, index)
    start, _ = rows.starts
    planned: tuple[Any, ...] = (None, (), ())
    if plan is not None:
        if rows.weight_columns not in plan.columns:
            raise ValueError(
                f"plan: expected one for {rows.weight_columns}, got one for {plan.columns}"
            )
        check_data(plan=plan.data)
        number, entries = plan.columns.index(rows.weight_columns), plan.entries
        planned = plan.data, entries[:number], entries[number + 1 :]
    return _TaskEmbedding.apply(index, weight, rows.buffer, start, segments.offsets, *planned)  # type: ignore[no-untyped-call]
