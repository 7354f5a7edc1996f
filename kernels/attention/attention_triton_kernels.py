"""Attention over packed sequences on the GPU; `kernels.attention.attention` has the maths.

A program takes a tile of the packed stream, whatever sequences stand in it, so that short sequences
share a tile.  Every query row sees one interval of keys (its sequence's, cut off at its own place
when causal), and every key row is seen by one interval of queries.  A first kernel finds these
intervals by binary search in cu_seqlens; a tile then visits the blocks from the start of its first
row's interval to the end of its last row's.  Blocks that all of its rows see in whole, which are
nearly all in a long sequence, need no mask in the 16-bit formats; float32's products, which no
tensor core computes, cost so much more than a mask that telling these blocks apart gains nothing.

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

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments, attention_factors
from .attention_options import AttentionOptions

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


class Heads(NamedTuple):
    """A packed stream ``[T, H, D]``: its data and the strides of rows and heads."""

    data: Any
    row: int
    head: int

    @classmethod
    def of(cls, x: Tensor) -> "Heads":
        """The stream as a kernel argument."""
        return cls(x, x.stride(0), x.stride(1))


class Intervals(NamedTuple):
    """For every row, the rows ``first <= other < last`` of the other stream that it meets."""

    first: Any
    last: Any


class KernelOptions(NamedTuple):
    """The part of `AttentionOptions` that the three large kernels take.

    Of each value that is None the code is left out.  ``rng_offset`` is an argument of its own,
    since Triton would compile anew for some integers in a tuple.

    Attributes:
        scale: multiplies the scores.
        seed: of dropout, whose arguments (`DropoutArguments`) these three are; None without it.
        threshold: see seed.
        keep_scale: see seed.
    """

    scale: Any
    seed: Any
    threshold: Any
    keep_scale: Any

    @classmethod
    def of(cls, options: AttentionOptions) -> "KernelOptions":
        """The options as a kernel argument."""
        seed = options.seed if options.dropout_p > 0 else None
        return cls(options.softmax_scale, *DropoutArguments.of(options.dropout_p, seed))


# ---- intervals ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total", "total_other", "num_sequences", "search_steps"])
def intervals_kernel(
    cu_own,  # [S + 1], boundaries in the stream of the rows that ask
    cu_other,  # [S + 1], boundaries in the stream that they meet
    intervals,
    total,
    total_other,  # rows of the other stream: no interval leaves it, whatever the boundaries say
    num_sequences,
    search_steps,  # halvings that leave one of num_sequences + 1 places
    ROWS_ARE_KEYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """For every row, which rows of the other stream it meets."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # A row's sequence is the number of sequences that end at or before it.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        searching = low < high
        end = tl.load(cu_own + middle + 1, mask=searching, other=0)
        low = tl.where(searching & (end <= row), middle + 1, low)
        high = tl.where(searching & (end > row), middle, high)
    inside = low < num_sequences
    own_end = tl.load(cu_own + low + 1, mask=inside, other=0)
    first = tl.load(cu_other + low, mask=inside, other=0)
    last = tl.load(cu_other + low + 1, mask=inside, other=0)
    if CAUSAL:
        same_place = last - (own_end - row)  # as far from the end, where the two are aligned
        if ROWS_ARE_KEYS:
            first = tl.minimum(tl.maximum(first, same_place), last)
        else:
            last = tl.maximum(first, tl.minimum(last, same_place + 1))
    first, last = tl.maximum(first, 0), tl.minimum(last, total_other)
    tl.store(intervals.first + row, first, mask=row < total)
    tl.store(intervals.last + row, last, mask=row < total)


@triton.jit
def _load_intervals(intervals, rows, total):
    first = tl.load(intervals.first + rows, mask=rows < total, other=0)
    last = tl.load(intervals.last + rows, mask=rows < total, other=0)
    return first, last


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


@triton.jit
def _tile_pointers(x, head, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D > D:
        mask &= (d < D)[None, :]
    base = x.data + head.to(tl.int64) * x.head
    return base + rows.to(tl.int64)[:, None] * x.row + d[None, :], mask


@triton.jit
def _load_tile(x, head, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows that are ``inside``, zeros in place of the others."""
    pointers, mask = _tile_pointers(x, head, rows, inside, D, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_tile(x, head, rows, total, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers, mask = _tile_pointers(x, head, rows, rows < total, D, BLOCK_D)
    tl.store(pointers, values.to(x.data.dtype.element_ty), mask=mask)


# ---- forward ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_q", "rng_offset"])
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
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output and log-sum-exp of a tile of queries."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = _load_intervals(keys_of_queries, rows, total_q)
    q_tile = _load_tile(q, head, rows, rows < total_q, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)

    PARTS: tl.constexpr = 1 if PRECISION == "ieee" else 3
    bounds = _visits(first, last, BLOCK_N, PARTS)
    for part in tl.static_range(PARTS):
        for block in range(bounds[part], bounds[part + 1], BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            k_tile = _load_tile(k, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
            scores *= kernel_options.scale * _LOG2_E
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
            v_tile = _load_tile(v, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            acc *= rescale[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)

    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # no key seen: acc is 0, row_max is -inf
    _store_tile(out, head, rows, total_q, acc / row_sum[:, None], D, BLOCK_D)
    row_lse = row_max * _LN_2 + tl.log(row_sum)
    _store_row_numbers(lse, head, rows, total_q, row_lse)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["total_q"])
def delta_kernel(
    out,
    grad_out,
    delta,  # [H, total_q]
    total_q,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``delta_i``, the product of the rows of dO and O."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    out_tile = _load_tile(out, head, rows, rows < total_q, D, BLOCK_D).to(tl.float32)
    grad_tile = _load_tile(grad_out, head, rows, rows < total_q, D, BLOCK_D).to(tl.float32)
    _store_row_numbers(delta, head, rows, total_q, tl.sum(out_tile * grad_tile, 1))


@triton.jit
def _load_row_numbers(numbers, head, rows, total, inside):
    """Of the rows that are ``inside``, zeros in place of the others."""
    pointers = numbers + head.to(tl.int64) * total + rows
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def _store_row_numbers(numbers, head, rows, total, values):
    pointers = numbers + head.to(tl.int64) * total + rows
    tl.store(pointers, values, mask=rows < total)


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
    p = tl.exp2(scores * (kernel_options.scale * _LOG2_E) - row_lse[:, None])
    if MASKED:
        seen = (keys[None, :] >= first[:, None]) & (keys[None, :] < last[:, None])
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION)
    if kernel_options.seed is not None:
        dp *= attention_factors(rows, block, head, rng_offset, kernel_options, BLOCK_N)
    return p, dp


@triton.jit(do_not_specialize=["total_q", "rng_offset"])
def grad_q_kernel(
    q,
    k,
    v,
    grad_out,
    lse,
    delta,  # read, or with float32 written
    norm,  # written with float32, else None
    grad_q,
    keys_of_queries,
    total_q,
    kernel_options,
    rng_offset,
    PRECISION: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of a tile of queries; in float32 delta and norm too."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, last = _load_intervals(keys_of_queries, rows, total_q)
    q_tile = _load_tile(q, head, rows, first < last, D, BLOCK_D)
    do_tile = _load_tile(grad_out, head, rows, first < last, D, BLOCK_D)
    row_lse = _load_row_numbers(lse, head, rows, total_q, first < last) * _LOG2_E
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
                k_tile = _load_tile(k, head, keys, keys < bounds[PARTS], D, BLOCK_D)
                v_tile = _load_tile(v, head, keys, keys < bounds[PARTS], D, BLOCK_D)
                p, dp = _p_and_dp(
                    *(q_tile, do_tile, k_tile, v_tile, row_lse, rows, block, head, first, last),
                    *(kernel_options, rng_offset, part != 1, PRECISION, BLOCK_N),
                )
                weighted += tl.sum(p * dp, 1)
                total += tl.sum(p, 1)
        row_norm = 1.0 / tl.where(total == 0.0, 1.0, total)
        row_delta = weighted * row_norm
        _store_row_numbers(norm, head, rows, total_q, row_norm)
        _store_row_numbers(delta, head, rows, total_q, row_delta)
    else:
        row_delta = _load_row_numbers(delta, head, rows, total_q, first < last)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        for block in range(bounds[part], bounds[part + 1], BLOCK_N):
            keys = block + tl.arange(0, BLOCK_N)
            k_tile = _load_tile(k, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            v_tile = _load_tile(v, head, keys, keys < bounds[PARTS], D, BLOCK_D)
            p, dp = _p_and_dp(
                *(q_tile, do_tile, k_tile, v_tile, row_lse, rows, block, head, first, last),
                *(kernel_options, rng_offset, part != 1, PRECISION, BLOCK_N),
            )
            ds = p * (dp - row_delta[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    if PRECISION == "ieee":
        acc *= row_norm[:, None]
    _store_tile(grad_q, head, rows, total_q, acc * kernel_options.scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["total_q", "total_k", "rng_offset"])
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
    first, last = _load_intervals(queries_of_keys, keys, total_k)
    k_tile = _load_tile(k, head, keys, first < last, D, BLOCK_D)
    v_tile = _load_tile(v, head, keys, first < last, D, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    PARTS: tl.constexpr = 1 if PRECISION == "ieee" else 3
    bounds = _visits(first, last, BLOCK_M, PARTS)
    for part in tl.static_range(PARTS):
        for block in range(bounds[part], bounds[part + 1], BLOCK_M):
            rows = block + tl.arange(0, BLOCK_M)
            inside = rows < bounds[PARTS]
            q_tile = _load_tile(q, head, rows, inside, D, BLOCK_D)
            do_tile = _load_tile(grad_out, head, rows, inside, D, BLOCK_D)
            row_lse = _load_row_numbers(lse, head, rows, total_q, inside) * _LOG2_E
            row_delta = _load_row_numbers(delta, head, rows, total_q, inside)
            # Transposed, [keys, queries], which is how the last two products need P and dS.
            scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)
            p = tl.exp2(scores * (kernel_options.scale * _LOG2_E) - row_lse[None, :])
            if part != 1:
                seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
                p = tl.where(seen, p, 0.0)
            if PRECISION == "ieee":
                p *= _load_row_numbers(norm, head, rows, total_q, inside)[None, :]
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

    _store_tile(grad_k, head, keys, total_k, dk * kernel_options.scale, D, BLOCK_D)
    _store_tile(grad_v, head, keys, total_k, dv, D, BLOCK_D)
