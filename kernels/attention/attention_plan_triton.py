"""Plans of attention on the GPU; `kernels.attention.attention_plan` says what they are.

A first kernel finds, by binary search in cu_seqlens, the sequence of every row, and for every
sequence the first one that does not fit into a run beginning with it.  A second kernel, of one
program, follows that from sequence to sequence.

Boundaries that do not ascend or leave the stream give some plan whose runs and bounds stay in it.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

from .attention_plan import RUN_ALIGNMENT, RUN_TOKENS, max_runs

BLOCK = 128

_RUN_TOKENS = tl.constexpr(RUN_TOKENS)
_RUN_ALIGNMENT = tl.constexpr(RUN_ALIGNMENT)


@triton.jit
def sequences_that_end_behind(values, low, cu_seqlens, num_sequences, search_steps):
    """For each value, the first sequence from ``low`` on that ends behind it.

    num_sequences where there is none; ``search_steps`` halvings leave one of num_sequences + 1.
    """
    high = tl.zeros_like(low) + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        searching = low < high
        end = tl.load(cu_seqlens + middle + 1, mask=searching, other=0)
        low = tl.where(searching & (end <= values), middle + 1, low)
        high = tl.where(searching & (end > values), middle, high)
    return low


@triton.jit
def run_limits(begin):
    """Where runs that begin at these rows have to end."""
    return begin // _RUN_ALIGNMENT * _RUN_ALIGNMENT + _RUN_TOKENS


@triton.jit
def _load_starts(cu_seqlens, sequences, mask, total):
    starts = tl.load(cu_seqlens + sequences, mask=mask, other=0)
    return tl.minimum(tl.maximum(starts, 0), total)


@triton.jit
def _store_run(runs, run, begin, end, mask):
    tl.store(runs + 2 * run, begin, mask=mask)
    tl.store(runs + 2 * run + 1, end, mask=mask)


@triton.jit(do_not_specialize=["total", "num_sequences", "search_steps"])
def bounds_kernel(
    cu_seqlens,  # [S + 1]
    bounds,  # [2, total]
    following,  # [S], the first sequence that does not fit into a run beginning with this one
    total,
    num_sequences,
    search_steps,
    BLOCK: tl.constexpr,
):
    """The sequences of a block of rows, and what follows a block of sequences."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    search = (cu_seqlens, num_sequences, search_steps)

    sequence = sequences_that_end_behind(place, tl.zeros_like(place), *search)
    inside = sequence < num_sequences
    first = _load_starts(cu_seqlens, sequence, inside, total)
    last = _load_starts(cu_seqlens, sequence + 1, inside, total)
    tl.store(bounds + place, first, mask=place < total)
    tl.store(bounds + total + place, last, mask=place < total)

    is_sequence = place < num_sequences
    begin = _load_starts(cu_seqlens, place, is_sequence, total)
    # An end beyond the stream, which is a wrong one, counts as the stream's.
    limit = run_limits(begin)
    limit = tl.where(limit >= total, 2147483647, limit)
    next_sequence = sequences_that_end_behind(limit, place, *search)
    tl.store(following + place, next_sequence, mask=is_sequence)


@triton.jit(do_not_specialize=["total", "num_sequences", "num_runs"])
def runs_kernel(
    cu_seqlens,  # [S + 1]
    following,  # [S]
    runs,  # [num_runs, 2]
    total,
    num_sequences,
    num_runs,
    BLOCK: tl.constexpr,
):
    """All runs, by one program."""
    sequence = tl.zeros([], tl.int32)
    found = tl.zeros([], tl.int32)
    while (sequence < num_sequences) & (found < num_runs):
        next_sequence = tl.load(following + sequence)
        begin = _load_starts(cu_seqlens, sequence, True, total)
        end = _load_starts(cu_seqlens, next_sequence, True, total)
        is_run = (next_sequence > sequence) & (begin < end)
        _store_run(runs, found, begin, end, is_run)
        found += is_run.to(tl.int32)
        sequence = tl.maximum(next_sequence, sequence + 1)

    tokens = _load_starts(cu_seqlens, num_sequences, True, total)
    first_piece = run_limits(tokens) - _RUN_TOKENS
    for block in range(found, num_runs, BLOCK):
        run = block + tl.arange(0, BLOCK)
        # Pieces far behind the stream's end would overflow.
        piece = tl.minimum(run - found, (total - first_piece) // _RUN_TOKENS + 1)
        begin = first_piece + piece * _RUN_TOKENS
        end = tl.minimum(begin + _RUN_TOKENS, total)
        begin = tl.maximum(begin, tokens)
        is_run = begin < end
        begin, end = tl.where(is_run, begin, 0), tl.where(is_run, end, 0)
        _store_run(runs, run, begin, end, run < num_runs)


def make_plan(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Launch both kernels; runs and bounds of a plan."""
    num_sequences, num_runs = len(cu_seqlens) - 1, max_runs(total)
    bounds = cu_seqlens.new_empty(2, total)
    runs = cu_seqlens.new_empty(num_runs, 2)
    following = cu_seqlens.new_empty(num_sequences)
    steps = num_sequences.bit_length()
    blocks = triton.cdiv(max(total, num_sequences), BLOCK)
    if blocks > 0:
        arguments = (cu_seqlens, bounds, following, total, num_sequences, steps, BLOCK)
        bounds_kernel[(blocks,)](*arguments)
    runs_kernel[(1,)](cu_seqlens, following, runs, total, num_sequences, num_runs, BLOCK)
    return runs, bounds
