"""Sums of rows by task, for the gradients of a norm's parameters, in Triton.

Every program of a backward kernel takes rows of one task, sums them in registers, and writes one
partial row for each parameter; a second kernel adds the partial rows in their order, so that the
result has the same bits every time.  One launch runs the rows of eight tasks.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803, SIM102

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..token_offsets_triton import decode_offset, encode_offsets

# Segments of one launch: rows before the first task, eight tasks, rows after the last.
SEGMENTS = 10
# Rows of a program in the backward pass: few, so that a small batch occupies every multiprocessor,
# but of a large batch as many as leave no more programs than are added up cheaply.  Constants, so
# that the sums do not depend on the GPU.
_LEAST_ROWS = 8
_MOST_PROGRAMS = 1024
# The tile of the sum over programs: 128 rows are the programs of a task of 1,024 rows, which are
# then summed by one load for each thread; columns of 128 bytes, so that there are many programs.
SUMMED_PROGRAMS, SUMMED_COLUMNS = 128, 32


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _programs_of(boundaries, segment: tl.constexpr, log_rows):
    """First row, end, and number of programs of a segment."""
    begin = decode_offset(boundaries[segment])
    end = decode_offset(boundaries[segment + 1])
    return begin, end, (end - begin + (1 << log_rows) - 1) >> log_rows


@triton.jit
def rows_of_program(program, boundaries, log_rows, SEGMENTS: tl.constexpr):
    """First row and end of the rows of a program, all of one segment."""
    first, row_begin, row_end = 0 * program, 0 * program, 0 * program
    for segment in tl.static_range(SEGMENTS):
        begin, end, programs = _programs_of(boundaries, segment, log_rows)
        # The last segment that begins before the program is its own: empty ones have no program.
        reached = program >= first
        row_begin = tl.where(reached, begin + ((program - first) << log_rows), row_begin)
        row_end = tl.where(reached, end, row_end)
        first += programs
    return row_begin, tl.minimum(row_begin + (1 << log_rows), row_end)


@triton.jit
def store_partial(
    partials, sums, which: tl.constexpr, columns, N: tl.constexpr, SUMS: tl.constexpr
):
    """Store this program's sums for one parameter."""
    partial = partials + (tl.program_id(0).to(tl.int64) * SUMS + which) * N + columns
    tl.store(partial, sums, mask=columns < N)


@triton.jit
def _store_gradient(rows, task, stride, columns, total, ACCUMULATE: tl.constexpr, N: tl.constexpr):
    pointers = rows + task.to(tl.int64) * stride + columns
    if ACCUMULATE:
        total += tl.load(pointers, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(pointers, total.to(rows.dtype.element_ty), mask=columns < N)


@triton.jit(
    do_not_specialize=[
        "log_rows",
        "first_segment",
        "first_task",
        "weight_stride",
        "bias_stride",
        "x_bias_stride",
    ]
)
def sum_partials_kernel(
    partials,  # [programs, SUMS, N]
    weight_rows,  # [K, N], and so the others
    bias_rows,
    x_bias_rows,
    weight_stride,
    bias_stride,
    x_bias_stride,
    boundaries,
    log_rows,
    first_segment,
    first_task,
    ACCUMULATE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Add up the partial rows of one parameter and task, a block of columns."""
    which, own_segment = tl.program_id(1), tl.program_id(2) + first_segment
    task = tl.program_id(2) + first_task
    first, count = 0 * task, 0 * task
    for segment in tl.static_range(SEGMENTS):
        _, _, programs = _programs_of(boundaries, segment, log_rows)
        first += tl.where(segment < own_segment, programs, 0)
        count += tl.where(segment == own_segment, programs, 0)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_P):
        number = start + tl.arange(0, BLOCK_P)
        mask = (number < count)[:, None] & (columns < N)[None, :]
        elements = ((first + number).to(tl.int64) * SUMS + which)[:, None] * N + columns[None, :]
        total += tl.sum(tl.load(partials + elements, mask=mask, other=0.0), 0)
    if HAS_WEIGHT:
        if which == 0:
            _store_gradient(weight_rows, task, weight_stride, columns, total, ACCUMULATE, N)
    if HAS_BIAS:
        if which == 1:
            _store_gradient(bias_rows, task, bias_stride, columns, total, ACCUMULATE, N)
    if HAS_X_BIAS:
        if which == 2:
            _store_gradient(x_bias_rows, task, x_bias_stride, columns, total, ACCUMULATE, N)


# ---- launches -----------------------------------------------------------------------------------


class GradientRows(NamedTuple):
    """Rows ``[K, N]`` for the gradients of weight, bias and x_bias; empty where not wanted."""

    weight: Tensor
    bias: Tensor
    x_bias: Tensor

    @property
    def sums(self) -> int:
        """Number of sums that a program leaves."""
        if self.x_bias.numel() > 0:
            return 3
        if self.bias.numel() > 0:
            return 2
        return 1 if self.weight.numel() > 0 else 0


class BackwardGrid(NamedTuple):
    """What a backward kernel is launched with to run some segments of the stream.

    Attributes:
        programs: of the launch.
        boundaries: row numbers of ``SEGMENTS + 1`` boundaries, encoded.
        log_rows: a program has ``2**log_rows`` rows of one segment, or what is left of it.
        partials: where each program leaves its sums, ``[programs, sums, N]``; None: nowhere.
    """

    programs: int
    boundaries: tuple[int, ...]
    log_rows: int
    partials: Tensor | None


def rows_by_task(
    launch: Callable[[BackwardGrid], None],
    num_rows: int,
    rows_at_once: int,
    rows: GradientRows,
    offsets: Sequence[int],
    accumulate: bool,
    *,
    like: Tensor,
) -> None:
    """Run a backward kernel over all rows, and sum what it gives for the parameters by task.

    One launch runs the rows of eight tasks, and one more adds up the sums of its programs.

    Args:
        launch: the backward kernel.
        num_rows: rows of the stream; those of no task are run too.
        rows_at_once: rows of a tile.
        rows: written or added to.
        offsets: ``K + 1`` row numbers; not read when no gradient is wanted.
        accumulate: add to the rows.
        like: ``[..., N]``, tells width and device.
    """
    log_rows = max(_LEAST_ROWS, rows_at_once, triton.cdiv(num_rows, _MOST_PROGRAMS)) - 1
    log_rows, width, sums = log_rows.bit_length(), like.shape[-1], rows.sums
    # Segment 0 comes before the first task, task k is segment k + 1.
    ends = (0, *offsets, num_rows) if sums else (0, num_rows)
    for first in range(0, len(ends) - 1, SEGMENTS):
        own = ends[first : first + SEGMENTS + 1]
        programs = sum(triton.cdiv(end - begin, 1 << log_rows) for begin, end in pairwise(own))
        boundaries = encode_offsets(own, SEGMENTS + 1)
        partials = like.new_empty((programs, sums, width), dtype=torch.float32) if sums else None
        grid = BackwardGrid(programs, boundaries, log_rows, partials)
        if programs > 0:
            launch(grid)
        first_task = max(first - 1, 0)
        tasks = min(first + SEGMENTS, len(offsets)) - 1 - first_task
        if partials is not None and tasks > 0:
            _sum_partials(
                grid, partials, rows, first_task + 1 - first, first_task, tasks, accumulate
            )


def _sum_partials(
    grid: BackwardGrid,
    partials: Tensor,
    rows: GradientRows,
    first_segment: int,
    first_task: int,
    tasks: int,
    accumulate: bool,
) -> None:
    """Add up the partial sums of the tasks from ``first_task`` on, one a segment."""
    _, sums, width = partials.shape
    wanted = [own.numel() > 0 for own in rows]
    pointers = {own.data_ptr() for own in rows if own.numel() > 0}
    # One parameter may be weight and bias at once: then its rows get one sum after the other.
    together = [wanted] if len(pointers) == sum(wanted) else _one_by_one(wanted)
    for weight, bias, x_bias in together:
        sum_partials_kernel[(triton.cdiv(width, SUMMED_COLUMNS), sums, tasks)](
            partials,
            *(own if own.numel() > 0 else None for own in rows),
            *(own.stride(0) for own in rows),
            grid.boundaries,
            grid.log_rows,
            first_segment,
            first_task,
            ACCUMULATE=accumulate,
            HAS_WEIGHT=weight,
            HAS_BIAS=bias,
            HAS_X_BIAS=x_bias,
            SUMS=sums,
            N=width,
            BLOCK_P=SUMMED_PROGRAMS,
            BLOCK_N=SUMMED_COLUMNS,
            SEGMENTS=SEGMENTS,
        )


def _one_by_one(flags: list[bool]) -> list[list[bool]]:
    """Lists of which each has one of the flags that are set."""
    places = [place for place, flag in enumerate(flags) if flag]
    return [[place == own for place in range(len(flags))] for own in places]
