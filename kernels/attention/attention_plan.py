"""A plan of self-attention over a packed stream: which rows a GPU's kernels take together.

The stream is cut at the boundaries of its sequences into runs: whole sequences, one after the
other, that one program computes in one tile of ``RUN_TOKENS`` rows.  The tile begins at the
multiple of ``RUN_ALIGNMENT`` at or before the run's first row, since dropout draws its factors for
so many keys at a time, so that a run ``begin:end`` has

    end <= begin // RUN_ALIGNMENT * RUN_ALIGNMENT + RUN_TOKENS .

Greedy: a run takes sequences as long as they fit.  A sequence that fits into none is in no run: it
has 62 tokens or more, and the kernels that visit tiles compute it.  The rows behind the last
sequence are in runs of their own, which give zeros.

For T rows there is place for ``max_runs(T) = T // 31 + 2`` runs, a number that the host knows.  It
suffices: where a run ends before the last sequence, what follows ends beyond its tile, so that the
run and the sequences of the next one, or the long sequence behind it, have at least
``RUN_TOKENS - 3 + 1 = 62`` rows.  A row is in two of these pairs at most, so that t tokens are in
at most ``2 t / 62 + 1`` runs.  The n rows behind them take ``(n + 3) / 64`` runs, rounded up, which
is at most ``n // 31 + 1``.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (registers the operator)
from ..registration import validation
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.differentiation import refuse_derivative

RUN_TOKENS = 64
"""Rows of a run's tile."""
RUN_ALIGNMENT = 4
"""A tile begins at a multiple of this."""
SURELY_SHORT = RUN_TOKENS - RUN_ALIGNMENT + 1
"""Tokens of a sequence that fits into a run wherever it begins."""

_ops = torch.ops.superbert


class AttentionPlan(NamedTuple):
    """The runs of a stream's sequences; `attention_plan` makes it.

    Attributes:
        runs: int32 ``[max_runs(T), 2]``, the first row of each run and the row behind its last, in
            ascending order; zeros behind the last run.
        bounds: int32 ``[2, T]``, the first row of every row's sequence, and the row behind its
            last; zeros for rows behind the last sequence.
    """

    runs: Tensor
    bounds: Tensor


def max_runs(total: int) -> int:
    """Return the most runs of a stream of ``total`` rows."""
    return total // ((SURELY_SHORT + 1) // 2) + 2


def attention_plan_reference(cu_seqlens: Tensor, total: int) -> AttentionPlan:
    """Make a plan by a loop over sequences: what the operator computes, on the CPU."""
    starts: list[int] = cu_seqlens.tolist()
    bounds = torch.zeros(2, total, dtype=torch.int32)
    runs: list[tuple[int, int]] = []

    def limit(begin: int) -> int:
        return begin // RUN_ALIGNMENT * RUN_ALIGNMENT + RUN_TOKENS

    begin = end = 0
    for start, stop in pairwise(starts):
        bounds[:, start:stop] = torch.tensor([[start], [stop]])
        if stop > limit(begin):
            runs.append((begin, end))
            begin = start
        end = stop
        if stop > limit(start):
            begin = stop
    runs.append((begin, end))
    begin = starts[-1]
    while begin < total:
        runs.append((begin, min(total, limit(begin))))
        begin = limit(begin)
    padded = torch.zeros(max_runs(total), 2, dtype=torch.int32)
    found = [run for run in runs if run[0] < run[1]]
    padded[: len(found)] = torch.tensor(found, dtype=torch.int32).view(-1, 2)
    return AttentionPlan(padded, bounds)


# ---- registration -------------------------------------------------------------------------------


@register_fake("attention_plan")
def _fake(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    return cu_seqlens.new_empty(max_runs(total), 2), cu_seqlens.new_empty(2, total)


declare("attention_plan", cpu="cpp", cuda="triton")
refuse_derivative("attention_plan", name="attention_plan", instead="integers")


@register_cuda("attention_plan")
def _cuda(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    from . import attention_plan_triton

    if not 0 <= total <= 2**30:  # 32 bits hold the rows of runs
        raise ValueError(f"total: expected 0 <= total <= 2^30, got {total}")
    validation.check_data(cu_seqlens=cu_seqlens)
    _check_boundaries(cu_seqlens, total)
    return attention_plan_triton.make_plan(cu_seqlens, total)


def _check_boundaries(cu_seqlens: Tensor, total: int) -> None:
    is_valid = (
        cu_seqlens.dtype == torch.int32
        and cu_seqlens.dim() == 1
        and len(cu_seqlens) > 0
        and cu_seqlens.is_contiguous()
    )
    if not is_valid:
        raise ValueError(
            f"cu_seqlens: expected contiguous int32 [sequences + 1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_cuda and validation.may_look(cu_seqlens):
        validation.check_cu_seqlens("cu_seqlens", cu_seqlens, total)


def check_plan(runs: Tensor | None, bounds: Tensor | None, total: int, like: Tensor) -> None:
    """Check that a plan, or none, is one of a stream of ``total`` rows on the device of ``like``.

    Raises:
        ValueError: it is of other shapes, dtypes or another device.
    """
    if (runs is None) != (bounds is None):
        raise ValueError("runs, bounds: expected both or neither")
    if runs is None or bounds is None:
        return
    shapes = ("runs", runs, (max_runs(total), 2)), ("bounds", bounds, (2, total))
    for name, x, shape in shapes:
        validation.check_tensor(name, x, shape, torch.int32, like.device)
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected contiguous, got strides {x.stride()}")


# ---- public -------------------------------------------------------------------------------------


def attention_plan(cu_seqlens: Tensor, total: int) -> AttentionPlan:
    """Plan self-attention over a packed stream, once for all layers and both passes.

    `flash_attn_varlen_qkvpacked_func` and `flash_attn_varlen_func` take a plan as ``plan``; on a
    GPU they make one at every call that has none.  A CPU's kernels need no plan and only check its
    shapes.  A plan that was made on the CPU and then moved is the same.

    Args:
        cu_seqlens: int32 ``[S + 1]``, from 0 ascending to ``total`` at most.
        total: rows T of the stream.

    Returns:
        The plan, on the device of ``cu_seqlens``, which is not waited for.

    Raises:
        ValueError: a dtype, shape or value that does not fit; values on a GPU are looked at within
            `kernels.checked_values` alone.
    """
    return AttentionPlan(*_ops.attention_plan(cu_seqlens, total))
