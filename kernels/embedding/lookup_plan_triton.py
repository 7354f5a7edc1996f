"""Planned gradients of embedding tables on the GPU; `kernels.embedding.lookup_plan` has the plan.

A program adds up 128 columns of one piece, and either adds the sum to its gradient row or writes it
into a slot; a second kernel adds up the slots of the long runs, whose number is small.  No atomics,
float32 sums, always in the same order, which is that of `kernels.embedding.embedding_triton`.

The host does not wait to look at a plan, so no number in it leads a kernel beyond its tensors.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from .embedding_triton import COLUMNS
from .lookup_plan import PIECE, Layout

# A program that zeroes takes 16 elements for each thread of four warps, of 8 gradient rows.
ZEROED_RECORDS = 8
ZEROED_COLUMNS = 256


@triton.jit
def _record_of_program(plan, first_record, num_places, num_records):
    """Where the record of this program is, and its count."""
    record = plan + num_places + first_record + tl.program_id(0).to(tl.int64)
    return record, tl.load(record + num_records)


@triton.jit
def _load_fields(record, num_records):
    """The other fields of a record: its first place or slot, its task, its column or slot."""
    first = tl.load(record)
    task = tl.load(record + 2 * num_records)
    column = tl.load(record + 3 * num_records)
    return first, task, column


@triton.jit
def _add_to_row(
    buffer, task, column, sums, columns, num_rows, row_stride, num_columns, WIDTH: tl.constexpr
):
    is_row = (task >= 0) & (task < num_rows) & (column >= 0) & (column <= num_columns - WIDTH)
    mask = (columns < WIDTH) & is_row
    pointers = buffer + task * row_stride + column + columns
    held = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, (held + sums).to(buffer.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        *("first_record", "num_tokens", "num_places", "num_records", "first_slot", "num_slots"),
        *("num_rows", "row_stride", "num_columns"),
    ]
)
def planned_pieces_kernel(
    grad,  # [num_tokens, WIDTH]
    plan,  # [num_places] tokens, [4, num_records]
    slots,  # [num_slots, WIDTH]
    buffer,  # [num_rows, num_columns]
    first_record,
    num_tokens,
    num_places,
    num_records,
    first_slot,
    num_slots,
    num_rows,
    row_stride,
    num_columns,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the tokens of a piece."""
    record, count = _record_of_program(plan, first_record, num_places, num_records)
    if count > 0:
        first, task, column = _load_fields(record, num_records)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        number = tl.arange(0, PIECE)
        places = first + number
        own = (number < count) & (places >= 0) & (places < num_places)
        token = tl.load(plan + places, mask=own, other=0)
        own &= (token >= 0) & (token < num_tokens)
        mask = own[:, None] & (columns < WIDTH)[None, :]
        values = tl.load(grad + token[:, None] * WIDTH + columns[None, :], mask=mask, other=0.0)
        sums = tl.sum(values.to(tl.float32), 0)
        if task >= 0:
            row = (buffer, task, column, sums, columns, num_rows, row_stride, num_columns)
            _add_to_row(*row, WIDTH)
        else:
            slot = column - first_slot
            is_slot = (slot >= 0) & (slot < num_slots)
            tl.store(slots + slot * WIDTH + columns, sums, mask=(columns < WIDTH) & is_slot)


@triton.jit(
    do_not_specialize=[
        *("first_record", "num_places", "num_records", "first_slot", "num_slots"),
        *("num_rows", "row_stride", "num_columns"),
    ]
)
def planned_runs_kernel(
    plan,
    slots,
    buffer,
    first_record,
    num_places,
    num_records,
    first_slot,
    num_slots,
    num_rows,
    row_stride,
    num_columns,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Add up the pieces of a long run."""
    record, count = _record_of_program(plan, first_record, num_places, num_records)
    count = tl.minimum(count, num_slots)
    if count > 0:
        first, task, column = _load_fields(record, num_records)
        first -= first_slot
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        sums = tl.zeros([COLUMNS], tl.float32)
        for begin in range(0, count, PIECE):
            number = begin + tl.arange(0, PIECE)
            slot = first + number
            own = (number < count) & (slot >= 0) & (slot < num_slots)
            mask = own[:, None] & (columns < WIDTH)[None, :]
            elements = slot[:, None] * WIDTH + columns[None, :]
            sums += tl.sum(tl.load(slots + elements, mask=mask, other=0.0), 0)
        row = (buffer, task, column, sums, columns, num_rows, row_stride, num_columns)
        _add_to_row(*row, WIDTH)


@triton.jit(
    do_not_specialize=["num_places", "num_records", "num_rows", "row_stride", "num_columns"]
)
def zero_planned_rows_kernel(
    plan,
    buffer,
    num_places,
    num_records,
    num_rows,
    row_stride,
    num_columns,
    WIDTH: tl.constexpr,
    RECORDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Zero the gradient rows of some records."""
    number = tl.program_id(0).to(tl.int64) * RECORDS + tl.arange(0, RECORDS)
    record = plan + num_places + number
    is_record = number < num_records
    count = tl.load(record + num_records, mask=is_record, other=0)
    task = tl.load(record + 2 * num_records, mask=is_record, other=-1)
    column = tl.load(record + 3 * num_records, mask=is_record, other=0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = (count > 0) & (task >= 0) & (task < num_rows)
    is_row &= (column >= 0) & (column <= num_columns - WIDTH)
    pointers = buffer + (task * row_stride + column)[:, None] + columns[None, :]
    zeros = tl.zeros([RECORDS, COLUMNS], tl.float32).to(buffer.dtype.element_ty)
    tl.store(pointers, zeros, mask=is_row[:, None] & (columns < WIDTH)[None, :])


# ---- launchers ----------------------------------------------------------------------------------


def add_planned_gradients_(
    grad_output: Tensor, plan: Tensor, buffer: Tensor, layout: Layout, table: int
) -> None:
    """Add the rows of ``grad_output [T, H]`` to gradient rows in ``buffer [K, P]``, as planned."""
    tokens, width = grad_output.shape
    pieces, runs, slots = layout.of_table(table)
    num_pieces, num_runs = (part.stop - part.start for part in (pieces, runs))
    if num_pieces == 0:
        return
    num_slots, blocks = slots.stop - slots.start, triton.cdiv(width, COLUMNS)
    kept = grad_output.new_empty((num_slots, width), dtype=torch.float32)
    of_plan = (layout.places, layout.records, slots.start, num_slots)
    of_buffer = (len(buffer), buffer.stride(0), buffer.shape[1], width, PIECE, COLUMNS)
    tensors = (plan, kept, buffer)
    planned_pieces_kernel[(num_pieces, blocks)](
        grad_output.contiguous(), *tensors, pieces.start, tokens, *of_plan, *of_buffer
    )
    if num_runs:
        planned_runs_kernel[(num_runs, blocks)](*tensors, runs.start, *of_plan, *of_buffer)


def zero_planned_rows_(buffer: Tensor, plan: Tensor, layout: Layout, width: int) -> None:
    """Zero the gradient rows that a plan adds to."""
    if layout.records == 0:
        return
    grid = (triton.cdiv(layout.records, ZEROED_RECORDS), triton.cdiv(width, ZEROED_COLUMNS))
    zero_planned_rows_kernel[grid](
        *(plan, buffer, layout.places, layout.records),
        *(len(buffer), buffer.stride(0), buffer.shape[1]),
        *(width, ZEROED_RECORDS, ZEROED_COLUMNS),
    )
