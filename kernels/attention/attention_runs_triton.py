"""Attention of short sequences on the GPU: one program computes a run of them for one head.

`kernels.attention.attention_plan` says what a run is, `kernels.attention.attention` has the maths.
A run's scores are one tile ``[64, 64]``, masked outside of its sequences, so that the forward pass
needs no running maximum, and the backward pass one kernel: it recomputes P and dP once, takes
``delta_i = sum_j P_ij f_ij dP_ij`` from them, and writes dQ, dK and dV of its rows.  It needs no
output, and every row is written by one program: no atomics, the same bits every time.

Rows behind the last sequence have runs of their own, in which no row sees another: they give zeros,
whatever the inputs hold there.  A NaN inside a sequence can reach the other sequences of its run,
since 0 times NaN is NaN, and none in another run.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import attention_factors
from .attention_options import AttentionOptions
from .attention_plan import RUN_ALIGNMENT, RUN_TOKENS, AttentionPlan
from .attention_tiles_triton import (
    LN_2,
    LOG2_E,
    Heads,
    KernelOptions,
    Limits,
    limited,
    load_bounds,
    load_row_numbers,
    load_tile,
    padded_width,
    store_row_numbers,
    store_tile,
)

# Warps by kernel, bytes of an element and padded width.  No kernel spills registers or takes more
# shared memory than an sm_80 has; with float32's wider heads each would, on one GPU or another, so
# that these are computed by tiles.  The warps are not timed yet.
WARPS: dict[tuple[str, int, int], int] = {
    ("forward_runs", 2, 32): 4,
    ("forward_runs", 2, 64): 4,
    ("forward_runs", 2, 128): 4,
    ("forward_runs", 4, 32): 4,
    ("backward_runs", 2, 32): 4,
    ("backward_runs", 2, 64): 4,
    ("backward_runs", 2, 128): 8,
    ("backward_runs", 4, 32): 8,
}

_RUN_ALIGNMENT = tl.constexpr(RUN_ALIGNMENT)


@triton.jit
def _load_run(runs, num_heads, total):
    """Head, first row and end of the run of this program, inside the stream whatever it says."""
    run, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    begin = tl.load(runs + 2 * run)
    end = tl.load(runs + 2 * run + 1)
    return head, tl.maximum(begin, 0), tl.minimum(end, total)


@triton.jit
def _load_rows(bounds, begin, end, total, BLOCK: tl.constexpr):
    """The block of rows that a run lies in, which of them are in it, and the bounds of each."""
    block = begin // _RUN_ALIGNMENT * _RUN_ALIGNMENT
    rows = block + tl.arange(0, BLOCK)
    inside = (rows >= begin) & (rows < end)
    first, last = load_bounds(bounds, rows, total, inside)
    return block, rows, inside, first, last


@triton.jit(do_not_specialize=["total", "num_heads", "rng_offset", "before", "after"])
def forward_runs_kernel(
    q,
    k,
    v,
    out,
    lse,  # [H, total]
    runs,
    bounds,
    total,
    num_heads,
    kernel_options,
    rng_offset,
    before,
    after,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Output and log-sum-exp of a run's rows."""
    head, begin, end = _load_run(runs, num_heads, total)
    if begin < end:  # there are fewer runs than programs
        block, rows, inside, first, last = _load_rows(bounds, begin, end, total, BLOCK)
        sees = first < last
        first, last = limited(first, last, rows, before, after)
        q_tile = load_tile(q, head, rows, sees, D, BLOCK_D)
        k_tile = load_tile(k, head, rows, sees, D, BLOCK_D)
        v_tile = load_tile(v, head, rows, sees, D, BLOCK_D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        scores *= kernel_options.scale * LOG2_E
        seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        row_max = tl.max(scores, 1)
        p = tl.exp2(scores - tl.where(row_max == float("-inf"), 0.0, row_max)[:, None])
        row_sum = tl.sum(p, 1)
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # no key seen: p is 0, row_max is -inf
        if kernel_options.seed is not None:
            p *= attention_factors(rows, block, head, rng_offset, kernel_options, BLOCK)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        store_tile(out, head, rows, inside, acc / row_sum[:, None], D, BLOCK_D)
        store_row_numbers(lse, head, rows, total, inside, row_max * LN_2 + tl.log(row_sum))


@triton.jit(do_not_specialize=["total", "num_heads", "rng_offset", "before", "after"])
def backward_runs_kernel(
    q,
    k,
    v,
    grad_out,
    lse,  # [H, total]
    grad_q,
    grad_k,
    grad_v,
    runs,
    bounds,
    total,
    num_heads,
    kernel_options,
    rng_offset,
    before,
    after,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All gradients of a run's rows."""
    head, begin, end = _load_run(runs, num_heads, total)
    if begin < end:
        block, rows, inside, first, last = _load_rows(bounds, begin, end, total, BLOCK)
        sees = first < last
        first, last = limited(first, last, rows, before, after)
        q_tile = load_tile(q, head, rows, sees, D, BLOCK_D)
        k_tile = load_tile(k, head, rows, sees, D, BLOCK_D)
        row_lse = load_row_numbers(lse, head, rows, total, sees) * LOG2_E

        # Transposed, [keys, queries], which is how two of the three products need P and dS.
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
        p = tl.exp2(scores * (kernel_options.scale * LOG2_E) - row_lse[None, :])
        seen = (rows[:, None] >= first[None, :]) & (rows[:, None] < last[None, :])
        p = tl.where(seen, p, 0.0)
        if PRECISION == "ieee":  # lse is rounded, so that P's sums are not quite 1
            row_sum = tl.sum(p, 0)
            p *= (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[None, :]
        # The order saves registers: with all tiles loaded above an sm_80 spills, and with dV last
        # an sm_90 holds two programs at a time instead of three.
        do_tile = load_tile(grad_out, head, rows, sees, D, BLOCK_D)
        dropped = p
        if kernel_options.seed is not None:
            factors = tl.trans(
                attention_factors(rows, block, head, rng_offset, kernel_options, BLOCK)
            )
            dropped = p * factors
        grad = tl.dot(dropped.to(do_tile.dtype), do_tile, input_precision=PRECISION)
        store_tile(grad_v, head, rows, inside, grad, D, BLOCK_D)
        v_tile = load_tile(v, head, rows, sees, D, BLOCK_D)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        if kernel_options.seed is not None:
            dp *= factors
        ds = p * (dp - tl.sum(p * dp, 0)[None, :])
        ds = ds.to(q_tile.dtype)
        grad = tl.dot(ds, q_tile, input_precision=PRECISION)
        store_tile(grad_k, head, rows, inside, grad * kernel_options.scale, D, BLOCK_D)
        grad = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION)
        store_tile(grad_q, head, rows, inside, grad * kernel_options.scale, D, BLOCK_D)


# ---- launches -----------------------------------------------------------------------------------


def has_runs(x: Tensor) -> bool:
    """Whether these kernels compute heads of this dtype and width."""
    return ("backward_runs", x.element_size(), padded_width(x.shape[2])) in WARPS


def _constants(kernel: str, x: Tensor) -> dict[str, Any]:
    width = x.shape[2]
    block_d = padded_width(width)
    return {
        # float32 is computed as float32, not as TF32.
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "D": width,
        "BLOCK_D": block_d,
        "BLOCK": RUN_TOKENS,
        "num_warps": WARPS[kernel, x.element_size(), block_d],
    }


def _grid(plan: AttentionPlan, heads: int) -> tuple[int]:
    """The heads of a run are neighbours, as they are in memory."""
    return (len(plan.runs) * heads,)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
) -> None:
    """Write the rows of all runs into ``out`` and ``lse``."""
    total, heads, _ = q.shape
    forward_runs_kernel[_grid(plan, heads)](
        *map(Heads.of, (q, k, v, out)),
        lse,
        *plan,
        total,
        heads,
        KernelOptions.of(options),
        options.rng_offset,
        *Limits.of(options),
        **_constants("forward_runs", q),
    )


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    options: AttentionOptions,
    *,
    grads: tuple[Tensor, ...],
) -> None:
    """Write the rows of all runs into the gradients of q, k and v."""
    total, heads, _ = q.shape
    backward_runs_kernel[_grid(plan, heads)](
        *map(Heads.of, (q, k, v, grad_out)),
        lse,
        *map(Heads.of, grads),
        *plan,
        total,
        heads,
        KernelOptions.of(options),
        options.rng_offset,
        *Limits.of(options),
        **_constants("backward_runs", q),
    )
