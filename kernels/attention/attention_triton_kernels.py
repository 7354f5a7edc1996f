"""Attention on the GPU, tile by tile; `kernels.attention.attention` has the maths.

A program takes a tile of the packed stream, whatever sequences stand in it.  Every query row sees
one interval of keys (its sequence's, cut off at the window around its own place), and every key row
is seen by one interval of queries.  In self-attention the bounds of a row's sequence, from the plan
(`kernels.attention.attention_plan`), are its interval, and tiles leave alone the rows of sequences
that are in runs, which other kernels compute (attention_runs_triton.py).  Where queries and keys
have boundaries of their own, a first kernel finds the intervals by binary search in cu_seqlens.  A
tile then visits the blocks from the start of its first row's interval to the end of its last row's.
Blocks that all of its rows see in whole, which are nearly all in a long sequence, need no mask in
the 16-bit formats; float32's products, which no tensor core computes, cost so much more than a mask
that telling these blocks apart gains nothing.

Backward recomputes P by tiles of queries for dQ and by tiles of keys for dK and dV: each gradient
is written once, by one program, without atomics and with the same bits every time.  Rows that see
nothing are written as zeros, which is what rows behind the last sequence are defined to be, and
whatever the inputs hold behind it is not used.  A NaN inside a sequence, though, can reach the
sequences that share a tile with it, since 0 times NaN is NaN; in a query that sees no key the
launcher puts zeros in its place.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803, N806

import triton
import triton.language as tl

from ..dropout.philox_triton import attention_factors
from .attention_plan import RUN_ALIGNMENT
from .attention_plan_triton import sequences_that_end_behind
from .attention_tiles_triton import (
    LN_2,
    LOG2_E,
    limited,
    load_bounds,
    load_row_numbers,
    load_tile,
    store_row_numbers,
    store_tile,
)

_RUN_ALIGNMENT = tl.constexpr(RUN_ALIGNMENT)


# ---- intervals ----------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=[
        *("total", "total_other", "num_sequences", "search_steps", "before", "after"),
    ]
)
def intervals_kernel(
    cu_own,  # [S + 1], boundaries in the stream of the rows that ask
    cu_other,  # [S + 1], boundaries in the stream that they meet
    intervals,  # [2, total]
    total,
    total_other,  # rows of the other stream: no interval leaves it, whatever the boundaries say
    num_sequences,
    search_steps,  # halvings that leave one of num_sequences + 1 places
    before,  # rows of the other stream that a row meets before its own place, None: all
    after,  # those behind it
    BLOCK: tl.constexpr,
):
    """For every row, which rows of the other stream it meets."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = sequences_that_end_behind(row, tl.zeros_like(row), cu_own, num_sequences, search_steps)
    inside = low < num_sequences
    own_end = tl.load(cu_own + low + 1, mask=inside, other=0)
    first = tl.load(cu_other + low, mask=inside, other=0)
    last = tl.load(cu_other + low + 1, mask=inside, other=0)
    # As far from the end, where the two are aligned.
    first, last = limited(first, last, last - (own_end - row), before, after)
    first, last = tl.maximum(first, 0), tl.minimum(last, total_other)
    tl.store(intervals + row, first, mask=row < total)
    tl.store(intervals + total + row, last, mask=row < total)


@triton.jit
def _load_intervals(
    intervals,
    rows,
    total,
    before,
    after,
    LONGER_THAN: tl.constexpr,
):
    """Which rows of the other stream these rows meet, and which of them this kernel writes.

    With LONGER_THAN the intervals are the bounds of sequences, of which this kernel computes those
    that do not fit into a run of so many tokens, 0 for all, within the window; None for intervals
    as they are.
    """
    inside = rows < total
    first, last = load_bounds(intervals, rows, total, inside)
    if LONGER_THAN is not None:
        is_long = last - first // _RUN_ALIGNMENT * _RUN_ALIGNMENT > LONGER_THAN
        # Nothing outside of the stream is loaded, whatever a plan says.
        first, last = tl.maximum(first, 0), tl.minimum(last, total)
        if before is not None:
            first, last = limited(first, tl.maximum(last, 0), rows, before, after)
        first, last = tl.where(is_long, first, 0), tl.where(is_long, last, 0)
        if LONGER_THAN > 0:
            inside &= is_long
    return first, last, inside


@triton.jit
def _visits(first, last, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """The blocks that a tile visits: the bounds of three ranges, the middle one met in whole.

    Of one range when PARTS is 1.
    """
    stop = tl.max(last, 0)
    start = tl.min(tl.where(last > first, first, stop), 0) // BLOCK * BLOCK
    if PARTS == 1:
        return start, stop
    else:  # noqa: RET505  Triton 3.6 compiles what follows a return, and refuses another type
        whole_start = tl.minimum(tl.cdiv(tl.max(first, 0), BLOCK) * BLOCK, stop)
        whole_stop = tl.maximum(whole_start, tl.min(last, 0) // BLOCK * BLOCK)
        return start, whole_start, whole_stop, stop


# ---- forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_q", "rng_offset", "before", "after"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,  # [H, total_q]
    keys_of_queries,
    total_q,
    kernel_options,
    rng_offset,
    before,
    after,
    LONGER_THAN: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last, written = _load_intervals(
        keys_of_queries, rows, total_q, before, after, LONGER_THAN
    )
    q_tile = load_tile(q, head, rows, written, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

    PARTS: tl.constexpr = 1 if PRECISION == "ieee" else 3
    bounds = _visits(first, last, BLOCK_N, PARTS)
    for part in tl.static_range(PARTS):
        for block in range(bounds[part], bounds[part + 1], BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            k_tile = load_tile(k, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            scores *= kernel_options.scale * LOG2_E
            if part != 1:
                seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
                scores = tl.where(seen, scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1))
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(scores - shift[:, None])
            rescale = tl.exp2(row_max - shift)
            row_max = new_max
            row_sum = row_sum * rescale + tl.sum(p, 1)
            if kernel_options.seed is not None:
                p *= attention_factors(rows, block, head, rng_offset, kernel_options, BLOCK_N)
            v_tile = load_tile(v, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            acc *= rescale[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # no key seen: acc is 0, row_max is -inf
    store_tile(out, head, rows, written, acc / row_sum[:, None], D, BLOCK_D)
    store_row_numbers(lse, head, rows, total_q, written, row_max * LN_2 + tl.log(row_sum))


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def _p_and_dp(
    q_tile,
    do_tile,
    k_tile,
    v_tile,
    row_lse,
    rows,
    block,
    head,
    first,
    last,
    kernel_options,
    rng_offset,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """P and f dP of a tile of queries and the block of keys from ``block`` on."""
    keys = block + tl.arange(0, BLOCK_N)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
    p = tl.exp2(scores * (kernel_options.scale * LOG2_E) - row_lse[:, None])
    if MASKED:
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
    if kernel_options.seed is not None:
        dp *= attention_factors(rows, block, head, rng_offset, kernel_options, BLOCK_N)
    return p, dp


@triton.jit(do_not_specialize=["total_q", "rng_offset", "before", "after"])
def grad_q_kernel(
    q,
    k,
    v,
    out,
    grad_out,
    lse,
    delta,  # written
    norm,  # written with float32, else None
    grad_q,
    keys_of_queries,
    total_q,
    kernel_options,
    rng_offset,
    before,
    after,
    LONGER_THAN: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of a tile of queries, and their delta and norm."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last, written = _load_intervals(
        keys_of_queries, rows, total_q, before, after, LONGER_THAN
    )
    q_tile = load_tile(q, head, rows, first < last, D, BLOCK_D)
    do_tile = load_tile(grad_out, head, rows, first < last, D, BLOCK_D)
    row_lse = load_row_numbers(lse, head, rows, total_q, first < last) * LOG2_E
    PARTS: tl.constexpr = 1 if PRECISION == "ieee" else 3
    bounds = _visits(first, last, BLOCK_N, PARTS)

    if PRECISION == "ieee":
        # norm_i = 1 / sum_j P_ij is not quite 1, since lse is rounded; it takes that out of P.
        # delta_i = norm_i sum_j P_ij f_ij dP_ij: its roundings are those of P and dP, so that their
        # difference dP - delta loses less than with the other form.  A pass more, float32 only.
        weighted = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for part in tl.static_range(PARTS):
            for block in range(bounds[part], bounds[part + 1], BLOCK_N):
                keys = block + tl.arange(0, BLOCK_N)
                k_tile = load_tile(k, head, keys, keys < bounds[PARTS], D, BLOCK_D)
                v_tile = load_tile(v, head, keys, keys < bounds[PARTS], D, BLOCK_D)
                p, dp = _p_and_dp(
                    *(q_tile, do_tile, k_tile, v_tile, row_lse, rows, block, head, first, last),
                    *(kernel_options, rng_offset, part != 1, PRECISION, BLOCK_N),
                )
                weighted += tl.sum(p * dp, 1)
                total += tl.sum(p, 1)
        row_norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        row_delta = weighted * row_norm
        store_row_numbers(norm, head, rows, total_q, rows < total_q, row_norm)
    else:
        out_tile = load_tile(out, head, rows, first < last, D, BLOCK_D)
        row_delta = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    # Of all rows: keys meet blocks that rows of others stand in, and 0 times NaN would count.
    store_row_numbers(delta, head, rows, total_q, rows < total_q, row_delta)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        for block in range(bounds[part], bounds[part + 1], BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            k_tile = load_tile(k, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            v_tile = load_tile(v, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            p, dp = _p_and_dp(
                *(q_tile, do_tile, k_tile, v_tile, row_lse, rows, block, head, first, last),
                *(kernel_options, rng_offset, part != 1, PRECISION, BLOCK_N),
            )
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    if PRECISION == "ieee":
        acc *= row_norm[:, None]
    store_tile(grad_q, head, rows, written, acc * kernel_options.scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["total_q", "total_k", "rng_offset", "before", "after"])
def grad_kv_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,
    norm,  # read with float32, else None
    grad_k,
    grad_v,
    queries_of_keys,
    total_q,
    total_k,
    kernel_options,
    rng_offset,
    before,
    after,
    LONGER_THAN: tl.constexpr,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of a tile of keys and values."""
    head = tl.program_id(1)
    first_key = tl.program_id(0) * BLOCK_N
    keys = first_key + tl.arange(0, BLOCK_N)
    first, last, written = _load_intervals(
        queries_of_keys, keys, total_k, before, after, LONGER_THAN
    )
    k_tile = load_tile(k, head, keys, first < last, D, BLOCK_D)
    v_tile = load_tile(v, head, keys, first < last, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    PARTS: tl.constexpr = 1 if PRECISION == "ieee" else 3
    bounds = _visits(first, last, BLOCK_M, PARTS)
    for part in tl.static_range(PARTS):
        for block in range(bounds[part], bounds[part + 1], BLOCK_M):
            rows = block + tl.arange(0, BLOCK_M)
            inside = rows < bounds[PARTS]
            q_tile = load_tile(q, head, rows, inside, D, BLOCK_D)
            do_tile = load_tile(grad_out, head, rows, inside, D, BLOCK_D)
            row_lse = load_row_numbers(lse, head, rows, total_q, inside) * LOG2_E
            row_delta = load_row_numbers(delta, head, rows, total_q, inside)
            # Transposed, [keys, queries], which is how the last two products need P and dS.
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            p = tl.exp2(scores * (kernel_options.scale * LOG2_E) - row_lse[None, :])
            if part != 1:
                seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
                p = tl.where(seen, p, 0.0)
            if PRECISION == "ieee":
                p *= load_row_numbers(norm, head, rows, total_q, inside)[None, :]
            dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
            dropped = p
            if kernel_options.seed is not None:
                factors = attention_factors(
                    rows, first_key, head, rng_offset, kernel_options, BLOCK_N
                )
                dropped = p * tl.trans(factors)
                dp *= tl.trans(factors)
            ds = p * (dp - row_delta[None, :])
            dv = tl.dot(dropped.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)

    store_tile(grad_k, head, keys, written, dk * kernel_options.scale, D, BLOCK_D)
    store_tile(grad_v, head, keys, written, dv, D, BLOCK_D)
