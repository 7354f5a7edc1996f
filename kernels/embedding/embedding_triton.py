"""Gradients of embedding tables on the GPU; `kernels.embedding` has the maths.

The tokens are sorted by task and table row, so that those of one table row are a run.  A run is
summed by pieces of 32 tokens, one program each; a run of one piece, which nearly all words are,
goes straight into the table, and the pieces of longer ones (token types, positions, [CLS]) are
summed by a second kernel.  No atomics, float32 sums, always in the same order.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from collections.abc import Sequence
from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lookup_plan import PIECE

# Columns of a program: 32 elements of a piece for each thread of four warps.
COLUMNS = 128


@triton.jit
def _add_to_table(
    rows, row_stride, num_keys, key, sums, columns, N: tl.constexpr, WIDTH: tl.constexpr
):
    # An index that no table row has, which the host must not wait for, adds to none beyond them.
    mask = (columns < WIDTH) & (key >= 0) & (key < num_keys)
    pointers = rows + key // N * row_stride + key % N * WIDTH + columns
    held = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, (held + sums).to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "row_stride", "num_keys"])
def _pieces_kernel(
    grad,  # [T, WIDTH]
    keys,  # [total], ascending: task * N + table row
    tokens,  # [total], the rows of grad that the keys belong to
    run_starts,  # [total], where the run of each place begins
    pieces,  # [total, WIDTH], written where a piece of a longer run begins
    rows,  # [K, N, WIDTH]
    total,
    row_stride,
    num_keys,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0)
    run_start = tl.load(run_starts + place)
    if (place - run_start) % PIECE == 0:
        key = tl.load(keys + place)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        places = place + tl.arange(0, PIECE)
        own = tl.load(keys + places, mask=places < total, other=-1) == key
        token = tl.load(tokens + places, mask=own, other=0)
        mask = own[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(grad + token[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        sums = tl.sum(values.to(tl.float32), 0)
        after = tl.load(keys + place + PIECE, mask=place + PIECE < total, other=-1)
        if (place == run_start) & (after != key):
            _add_to_table(rows, row_stride, num_keys, key, sums, columns, N, WIDTH)
        else:
            piece = pieces + place.to(tl.int64) * WIDTH + columns
            tl.store(piece, sums, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["total", "row_stride", "num_keys"])
def _long_runs_kernel(
    keys,
    run_starts,
    pieces,
    rows,
    total,
    row_stride,
    num_keys,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    place = tl.program_id(0)
    run_start = tl.load(run_starts + place)
    key = tl.load(keys + place)
    after = tl.load(keys + place + PIECE, mask=place + PIECE < total, other=-1)
    if (place == run_start) & (after == key):
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([COLUMNS], tl.float32)
        first = place
        while tl.load(keys + first, mask=first < total, other=-1) == key:
            places = first + tl.arange(0, PIECE) * PIECE
            own = tl.load(keys + places, mask=places < total, other=-1) == key
            elements = places.to(tl.int64)[:, None] * WIDTH + columns[None, :]
            mask = own[:, None] & (columns < WIDTH)[None, :]
            sums += tl.sum(tl.load(pieces + elements, mask=mask, other=0.0), 0)
            first += PIECE * PIECE
        _add_to_table(rows, row_stride, num_keys, key, sums, columns, N, WIDTH)


def add_task_gradients_(
    grad_output: Tensor, index: Tensor, rows: Tensor, offsets: Sequence[int]
) -> None:
    """Add the rows of ``grad_output [T, H]`` of task k to ``rows[k] [N, H]`` at ``index [T]``."""
    _, table_rows, width = rows.shape
    if len(offsets) < 2 or offsets[-1] == offsets[0]:
        return
    own = slice(offsets[0], offsets[-1])
    keys = index[own].clone()
    for task, (start, end) in enumerate(pairwise(offsets)):
        keys[start - offsets[0] : end - offsets[0]] += task * table_rows
    keys, tokens = keys.sort(stable=True)
    grad = grad_output[own].contiguous()
    total = keys.numel()
    run_starts = torch.searchsorted(keys, keys)
    pieces = grad.new_empty((total, width), dtype=torch.float32)
    grid = (total, triton.cdiv(width, COLUMNS))
    num_keys = len(rows) * table_rows
    numbers = (total, rows.stride(0), num_keys, table_rows, width, PIECE, COLUMNS)
    _pieces_kernel[grid](grad, keys, tokens, run_starts, pieces, rows, *numbers)
    _long_runs_kernel[grid](keys, run_starts, pieces, rows, *numbers)
