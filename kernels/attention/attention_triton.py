"""Launches the Triton kernels of attention: which of them, tile sizes, grids, what is allocated.

Self-attention follows a plan: kernels for runs take the short sequences (attention_runs_triton.py),
kernels that visit tiles the others, and these are not launched where the host knows that there are
none.  Attention of queries with boundaries of their own visits tiles alone.
"""

# Triton's decorated functions are untyped.
# mypy: allow-untyped-calls, ignore-missing-imports

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import attention_plan_triton, attention_runs_triton
from .attention_options import AttentionOptions
from .attention_plan import RUN_TOKENS, SURELY_SHORT, AttentionPlan
from .attention_tiles_triton import MAX_WIDTH, Heads, KernelOptions, Limits, padded_width
from .attention_triton_kernels import (
    forward_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    intervals_kernel,
)


class Tiles(NamedTuple):
    """Tile sizes and launch settings of one kernel."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By kernel, bytes of an element and padded width.  No kernel spills registers or takes more shared
# memory than an sm_80 has.  Those of 2 bytes and width 64 are about the fastest of a dozen on an
# H200 (bench/results/h200); the others are not timed yet.
TILES: dict[tuple[str, int, int], Tiles] = {
    ("forward", 2, 32): Tiles(64, 64, 4, 2),
    ("forward", 2, 64): Tiles(64, 32, 4, 2),
    ("forward", 2, 128): Tiles(64, 32, 8, 2),
    ("forward", 4, 32): Tiles(64, 32, 4, 2),
    ("forward", 4, 64): Tiles(64, 32, 8, 2),
    ("forward", 4, 128): Tiles(32, 16, 8, 2),
    ("grad_q", 2, 32): Tiles(64, 64, 4, 2),
    ("grad_q", 2, 64): Tiles(64, 32, 4, 3),
    ("grad_q", 2, 128): Tiles(64, 32, 8, 3),
    ("grad_q", 4, 32): Tiles(64, 32, 8, 2),
    ("grad_q", 4, 64): Tiles(64, 32, 8, 2),
    ("grad_q", 4, 128): Tiles(32, 16, 4, 2),
    ("grad_kv", 2, 32): Tiles(32, 64, 4, 2),
    ("grad_kv", 2, 64): Tiles(32, 32, 2, 2),
    ("grad_kv", 2, 128): Tiles(64, 32, 8, 2),
    ("grad_kv", 4, 32): Tiles(32, 64, 4, 2),
    ("grad_kv", 4, 64): Tiles(32, 32, 4, 2),
    ("grad_kv", 4, 128): Tiles(32, 32, 8, 1),
}
# The same, where sequences are longer than LONG tokens on average and others are faster.
LONG_TILES: dict[tuple[str, int, int], Tiles] = {
    ("forward", 2, 64): Tiles(64, 64, 4, 3),
}
LONG = 512
INTERVAL_ROWS = 128


class _Work(NamedTuple):
    """Which kernels compute a call, and what the rows of a stream meet.

    Attributes:
        plan: of self-attention; None where queries have boundaries of their own.
        by_runs: whether the kernels for runs take the short sequences.
        by_tiles: whether there may be sequences for the others.
    """

    plan: AttentionPlan | None
    by_runs: bool
    by_tiles: bool

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        plan: AttentionPlan | None,
        max_seqlen: int | None,
    ) -> "_Work":
        if q.shape[2] > MAX_WIDTH:
            raise ValueError(f"q: heads of at most {MAX_WIDTH} columns on a GPU, got {q.shape[2]}")
        same = cu_seqlens_q.data_ptr() == cu_seqlens_k.data_ptr() and len(q) == len(k)
        if plan is None and same:
            plan = AttentionPlan(*attention_plan_triton.make_plan(cu_seqlens_q, len(q)))
        by_runs = plan is not None and attention_runs_triton.has_runs(q)
        all_short = max_seqlen is not None and max_seqlen <= SURELY_SHORT
        return cls(plan, by_runs, by_tiles=not (by_runs and all_short))

    def intervals(
        self,
        cu_own: Tensor,
        cu_other: Tensor,
        total: int,
        total_other: int,
        limits: Limits,
    ) -> Tensor:
        """For every row, the rows ``first <= other < last`` that it meets: int32 ``[2, total]``.

        With a plan the bounds of its sequence, which the kernels cut off at the limits.
        """
        if self.plan is not None:
            return self.plan.bounds
        intervals = cu_own.new_empty(2, total)
        num_sequences = len(cu_own) - 1
        intervals_kernel[(triton.cdiv(total, INTERVAL_ROWS),)](
            cu_own,
            cu_other,
            intervals,
            total,
            total_other,
            num_sequences,
            num_sequences.bit_length(),
            *limits,
            INTERVAL_ROWS,
        )
        return intervals

    def constants(self, kernel: str, x: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
        """The constexpr arguments and launch settings of a kernel that visits tiles."""
        block_d = padded_width(x.shape[2])
        key = (kernel, x.element_size(), block_d)
        long = len(x) > LONG * (len(cu_seqlens) - 1)
        tiles = LONG_TILES.get(key, TILES[key]) if long else TILES[key]
        longer_than = RUN_TOKENS if self.by_runs else 0
        return {
            "LONGER_THAN": None if self.plan is None else longer_than,
            # float32 is computed as float32, not as TF32.
            "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
            "D": x.shape[2],
            "BLOCK_D": block_d,
            "BLOCK_M": tiles.queries,
            "BLOCK_N": tiles.keys,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
    *,
    plan: AttentionPlan | None = None,
    max_seqlen: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Output ``[Tq, H, D]`` and log-sum-exp ``[H, Tq]``.

    Self-attention without a plan makes one; ``max_seqlen`` is the length of its longest sequence,
    or more, None where that is not known.
    """
    total_q, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, total_q), dtype=torch.float32)
    work = _Work.of(q, k, cu_seqlens_q, cu_seqlens_k, plan, max_seqlen)
    if total_q == 0:
        return out, lse
    if work.plan is not None and work.by_runs:
        attention_runs_triton.forward(q, k, v, out, lse, work.plan, options)
    if work.by_tiles:
        constants = work.constants("forward", q, cu_seqlens_q)
        boundaries = (cu_seqlens_q, cu_seqlens_k, total_q, len(k))
        limits = Limits.of(options)
        forward_kernel[(triton.cdiv(total_q, constants["BLOCK_M"]), heads)](
            Heads.of(q),
            Heads.of(k),
            Heads.of(v),
            Heads.of(out),
            lse,
            work.intervals(*boundaries, limits),
            total_q,
            KernelOptions.of(options),
            options.rng_offset,
            *limits,
            **constants,
        )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
    *,
    grads: tuple[Tensor, ...],
    plan: AttentionPlan | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Write the gradients of q, k and v, which may be views of one tensor, into ``grads``."""
    grad_out = grad_out.contiguous()
    work = _Work.of(q, k, cu_seqlens_q, cu_seqlens_k, plan, max_seqlen)
    if work.plan is not None and work.by_runs and len(q) > 0:
        arguments = (grad_out, q, k, v, lse, work.plan, options)
        attention_runs_triton.backward(*arguments, grads=grads)
    if work.by_tiles:
        boundaries = (cu_seqlens_q, cu_seqlens_k)
        _backward_by_tiles(work, grad_out, q, k, v, out, lse, *boundaries, options, grads=grads)


def _backward_by_tiles(
    work: _Work,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
    *,
    grads: tuple[Tensor, ...],
) -> None:
    total_q, heads, _ = q.shape
    total_k = len(k)
    grad_q, grad_k, grad_v = grads
    # In self-attention every query sees a key.  Of other boundaries one may see none; its values
    # and gradients must not count, but a NaN among them would, times 0.
    if work.plan is None:
        blind = lse.isneginf().T[..., None]
        q, grad_out = q.masked_fill(blind, 0), grad_out.masked_fill(blind, 0)
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if q.dtype == torch.float32 else None
    saved = (Heads.of(grad_out), lse, delta, norm)
    streams = (Heads.of(q), Heads.of(k), Heads.of(v))
    numbers = (KernelOptions.of(options), options.rng_offset)
    if total_q > 0:
        constants = work.constants("grad_q", q, cu_seqlens_q)
        boundaries = (cu_seqlens_q, cu_seqlens_k, total_q, total_k)
        limits = Limits.of(options)
        keys = work.intervals(*boundaries, limits)
        grid = (triton.cdiv(total_q, constants["BLOCK_M"]), heads)
        of_queries = (Heads.of(grad_q), keys, total_q)
        arguments = (*streams, Heads.of(out), *saved, *of_queries, *numbers, *limits)
        grad_q_kernel[grid](*arguments, **constants)
    if total_k > 0:
        constants = work.constants("grad_kv", k, cu_seqlens_k)
        boundaries = (cu_seqlens_k, cu_seqlens_q, total_k, total_q)
        limits = Limits.of(options, rows_are_keys=True)
        queries = work.intervals(*boundaries, limits)
        grid = (triton.cdiv(total_k, constants["BLOCK_N"]), heads)
        of_keys = (Heads.of(grad_k), Heads.of(grad_v), queries, total_q, total_k)
        grad_kv_kernel[grid](*streams, *saved, *of_keys, *numbers, *limits, **constants)
