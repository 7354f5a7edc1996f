"""Plan on the host which tokens add up in which gradient rows of embedding tables.

A batch looks up row ``i_t`` of a table for each of its tokens; :mod:`~kernels.embedding.embedding`
has the maths of the gradients.  Which tokens looked up the same row is known with the batch, so a
thread that prepares batches sorts them, for all tables together, and the device neither sorts nor
searches.

A *run* is the tokens of one task that looked up one row of one table, in ascending order.  It is
cut into *pieces* of 32 tokens.  A run of one piece, which nearly all words are, is added to its
gradient row at once; the sums of the pieces of longer ones (token types, positions, [CLS]) are kept
in *slots*, and added up in order.  So sums are the same to the bit whoever sorted the tokens.

The plan is one tensor, int64 ``[n]``:

    tokens [M T]       of M tables, sorted by table, task, row and token
    records [4, R]     of the pieces of each table in turn, then of the long runs of each:
        first          place of a piece's first token above; slot of a run's first piece
        count          tokens of a piece, pieces of a run; 0 for a record that stands for nothing
        task           whose gradient row is added to; -1 for a piece that is kept in a slot
        column         the first column of that gradient row; or the slot

As many records are there as a batch of these token counts can need (:class:`Layout`), so that a
recorded step takes the plan of every batch of its shape.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..registration.backend import declare, register_cuda, register_fake
from ..registration.validation import (
    check_data,
    check_kernel_dtype,
    check_offsets,
    check_rows_apart,
    check_tensor,
    may_look,
)
from ..task_rows import Columns

PIECE = 32
"""Tokens of a piece; on the GPU a tile of 32 tokens and 128 columns."""
ALL_TABLES = -1
"""In an operator's argument."""
_IN_SLOT = -1
_FIELDS = 4

Ints = npt.NDArray[np.int64]


class LookupPlan(NamedTuple):
    """The order in which the tokens of a batch are added to the gradient rows of tables.

    Attributes:
        data: int64 ``[n]``, as the module describes it; on the device of the batch.
        columns: of the tables, in their order; the columns of one buffer.
    """

    data: Tensor
    columns: tuple[Columns, ...]

    @property
    def entries(self) -> tuple[int, ...]:
        """The number of rows of each table."""
        return tuple(columns.shape[0] for columns in self.columns)

    @property
    def width(self) -> int:
        """The columns of a row, H, in all tables."""
        return self.columns[0].shape[1]


class Layout(NamedTuple):
    """The parts of a plan, bounded by the tokens of each task and the rows of each table.

    A run of c tokens has ``ceil(c / 32)`` pieces.  Of T tokens in D runs there are at most
    ``D + (T - D) // 32``; D is at most T, and at most the number of rows.

    Attributes:
        places: of sorted tokens.
        pieces: before which records each table's pieces begin, and one past the last.
        runs: before which of the records behind the pieces its long runs begin, likewise.
        slots: before which slots its own begin, likewise.
    """

    places: int
    pieces: tuple[int, ...]
    runs: tuple[int, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, entries: Sequence[int], offsets: Sequence[int]) -> "Layout":
        """Return the layout for tables of so many rows, and tasks that begin at these tokens."""
        counts = [end - start for start, end in pairwise(offsets)]
        pieces, runs, slots = [], [], []
        for rows in entries:
            most = [(min(count, rows), min(count // (PIECE + 1), rows)) for count in counts]
            pieces.append(sum(d + (c - d) // PIECE for c, (d, _) in zip(counts, most, strict=True)))
            slots.append(sum(d + (c - d) // PIECE for c, (_, d) in zip(counts, most, strict=True)))
            runs.append(sum(long for _, long in most))
        of_tables = (tuple(accumulate(numbers, initial=0)) for numbers in (pieces, runs, slots))
        return cls(len(entries) * sum(counts), *of_tables)

    @property
    def records(self) -> int:
        """R."""
        return self.pieces[-1] + self.runs[-1]

    @property
    def numel(self) -> int:
        """Elements of the plan."""
        return self.places + _FIELDS * self.records

    def of_table(self, table: int) -> tuple[slice, slice, slice]:
        """Return a table's records of pieces and of long runs, and its slots."""
        first, end = (0, -1) if table == ALL_TABLES else (table, table + 1)
        pieces, runs, slots = (slice(each[first], each[end]) for each in self[1:])
        return pieces, slice(self.pieces[-1] + runs.start, self.pieces[-1] + runs.stop), slots


# ---- on the host --------------------------------------------------------------------------------


def plan_lookups(
    indices: Sequence[Tensor], columns: Sequence[Columns], offsets: Sequence[int]
) -> LookupPlan:
    """Sort the tokens of a batch by the table rows that they look up; call it on the host.

    Args:
        indices: for each table ``[T]`` int64 on the CPU, the row that each token looks up.
        columns: of each table ``[N, H]`` in one gradient buffer; all of one H.
        offsets: ``K + 1`` ascending token numbers, where tasks begin.  Tokens outside of them are
            in no plan.

    Returns:
        The plan, on the CPU.  Its size is the same for all batches with these offsets.

    Raises:
        ValueError: no table, a table twice, tables of several widths, offsets that do not ascend
            within the stream, or an index that is not in its table; the message names it.
    """
    columns = tuple(Columns(each.start, tuple(each.shape)) for each in columns)
    _check_tables(indices, columns)
    entries = tuple(each.shape[0] for each in columns)
    for number, (index, rows) in enumerate(zip(indices, entries, strict=True)):
        check_offsets("offsets", offsets, len(index))
        outside = (index < 0) | (index >= rows)
        if outside.any():
            place = int(outside.nonzero()[0])
            raise ValueError(
                f"indices[{number}]: expected 0 <= index < {rows}, got {int(index[place])} at "
                f"position {place}"
            )
    layout = Layout.of(entries, offsets)
    data = np.zeros(layout.numel, dtype=np.int64)
    records = data[layout.places :].reshape(_FIELDS, -1)
    records[2] = _IN_SLOT
    task = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    for number, (index, own) in enumerate(zip(indices, columns, strict=True)):
        first_place = number * len(task)
        keys = task * own.shape[0] + index.numpy()[offsets[0] : offsets[-1]]
        order = np.argsort(keys, kind="stable")
        data[first_place : first_place + len(task)] = offsets[0] + order
        pieces, runs, slots = layout.of_table(number)
        of_pieces, of_runs = _records(keys[order], own, first_place, slots.start)
        records[:, pieces.start : pieces.start + of_pieces.shape[1]] = of_pieces
        records[:, runs.start : runs.start + of_runs.shape[1]] = of_runs
    return LookupPlan(torch.from_numpy(data), columns)


def _records(keys: Ints, table: Columns, first_place: int, first_slot: int) -> tuple[Ints, Ints]:
    """Return the records of the pieces and of the long runs of one table's sorted keys."""
    rows, width = table.shape
    is_first = np.ones(len(keys), dtype=bool)
    is_first[1:] = keys[1:] != keys[:-1]
    start = np.flatnonzero(is_first)
    count = np.diff(start, append=len(keys))
    task, row = np.divmod(keys[start], rows)
    column = table.start + row * width

    pieces = -(-count // PIECE)
    run = np.repeat(np.arange(len(start)), pieces)
    within = np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    is_long = pieces > 1
    kept = is_long[run]
    slot = first_slot + np.cumsum(kept) - 1
    of_pieces = np.stack(
        [
            first_place + start[run] + PIECE * within,
            np.minimum(count[run] - PIECE * within, PIECE),
            np.where(kept, _IN_SLOT, task[run]),
            np.where(kept, slot, column[run]),
        ]
    )
    own_slots = slot[kept & (within == 0)]
    of_runs = np.stack([own_slots, pieces[is_long], task[is_long], column[is_long]])
    return of_pieces, of_runs


def _check_tables(indices: Sequence[Tensor], columns: Sequence[Columns]) -> None:
    """Refuse indices and columns of tables that no plan can be made of."""
    if not columns or len(indices) != len(columns):
        raise ValueError(
            f"indices: expected one for each of at least one table, got {len(indices)} for "
            f"{len(columns)}"
        )
    if any(len(each.shape) != 2 or each.shape[1] != columns[0].shape[1] for each in columns):
        raise ValueError(f"columns: expected tables [N, H] of one width, got {columns}")
    if min(each.start for each in columns) < 0 or min(min(each.shape) for each in columns) < 1:
        raise ValueError(f"columns: expected at least one row, column and start 0, got {columns}")
    for one, other in pairwise(sorted(columns)):
        if other.start < one.stop:
            raise ValueError(f"columns: {one} and {other} overlap; is a table looked up twice?")
    for number, index in enumerate(indices):
        if index.dtype != torch.int64 or index.shape != indices[0].shape or index.dim() != 1:
            raise ValueError(
                f"indices[{number}]: expected int64 {list(indices[0].shape)[:1]}, got "
                f"{index.dtype} {list(index.shape)}"
            )
        if index.device.type != "cpu":
            raise ValueError(f"indices[{number}]: expected on the CPU, got {index.device}")
        check_data(**{f"indices[{number}]": index})


# ---- reference ----------------------------------------------------------------------------------


def add_planned_gradients_reference_(
    grad_output: Tensor, plan: Tensor, buffer: Tensor, layout: Layout, table: int
) -> None:
    """Add the rows of dy ``[T, H]`` to gradient rows in ``buffer [K, P]``, as planned."""
    pieces, runs, slots = layout.of_table(table)
    tokens, records = plan[: layout.places], plan[layout.places :].view(_FIELDS, -1)
    wide = torch.promote_types(grad_output.dtype, torch.float32)
    of_pieces, of_runs = (r[:, r[1] > 0] for r in (records[:, pieces], records[:, runs]))
    sums = _sums(grad_output.to(wide), tokens, of_pieces)
    kept = of_pieces[2] == _IN_SLOT
    in_slots = sums.new_zeros(slots.stop - slots.start, sums.shape[1])
    in_slots[of_pieces[3, kept] - slots.start] = sums[kept]
    of_runs = torch.cat([of_runs[:1] - slots.start, of_runs[1:]])
    totals = _sums(in_slots, torch.arange(len(in_slots), device=plan.device), of_runs)
    for (_, _, task, column), values in ((of_pieces[:, ~kept], sums[~kept]), (of_runs, totals)):
        # No row is there twice.
        place = task[:, None], _columns_of(column, values.shape[1])
        buffer[place] = (buffer[place].to(wide) + values).to(buffer.dtype)


def zero_planned_rows_reference_(buffer: Tensor, plan: Tensor, layout: Layout, width: int) -> None:
    """Zero the gradient rows that a plan adds to."""
    _, count, task, column = plan[layout.places :].view(_FIELDS, -1)
    written = (count > 0) & (task != _IN_SLOT)
    buffer[task[written, None], _columns_of(column[written], width)] = 0


def _sums(rows: Tensor, order: Tensor, records: Tensor) -> Tensor:
    """Return a sum of ``rows[order]`` for each record, one after the other."""
    first, count = records[0], records[1]
    number = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    within = torch.arange(len(number), device=count.device) - (count.cumsum(0) - count)[number]
    sums = rows.new_zeros(len(count), rows.shape[1])
    return sums.index_add_(0, number, rows[order[first[number] + within]])


def _columns_of(column: Tensor, width: int) -> Tensor:
    return column[:, None] + torch.arange(width, device=column.device)


# ---- registration -------------------------------------------------------------------------------

torch.library.define(
    "superbert::add_planned_gradients_",
    "(Tensor grad_output, Tensor plan, Tensor(a!) buffer, SymInt[] entries, SymInt[] offsets, "
    "int table) -> ()",
)
torch.library.define(
    "superbert::zero_planned_rows_",
    "(Tensor(a!) buffer, Tensor plan, SymInt[] entries, SymInt[] offsets, SymInt width) -> ()",
)


def _check_plan(
    plan: Tensor, buffer: Tensor, entries: Sequence[int], offsets: Sequence[int], width: int
) -> Layout:
    """Check what both operators take; return the plan's layout."""
    check_kernel_dtype("buffer", buffer)
    if (
        buffer.dim() != 2
        or (buffer.shape[1] > 1 and buffer.stride(1) != 1)
        or (len(buffer) > 1 and buffer.stride(0) < buffer.shape[1])
    ):
        raise ValueError("buffer: expected [tasks, columns] with contiguous rows that lie apart")
    check_data(buffer=buffer)
    if not 1 <= width <= buffer.shape[1]:
        raise ValueError(f"width: expected 1 to the columns of buffer, got {width}")
    if not entries or not all(1 <= rows <= buffer.shape[1] // width for rows in entries):
        raise ValueError(f"entries: expected the rows of tables in buffer, got {list(entries)}")
    if len(offsets) != len(buffer) + 1:
        raise ValueError("offsets: expected tasks + 1 row numbers, of the rows of buffer")
    check_offsets("offsets", offsets, offsets[-1])
    # A Python number grows as it must; a shape beyond 64 bits is another one than the plan's.
    layout = Layout.of(entries, offsets)
    check_tensor("plan", plan, (layout.numel,), torch.int64, buffer.device)
    if not plan.is_contiguous():
        raise ValueError("plan: expected a contiguous tensor")
    return layout


def _check_gradients(
    grad_output: Tensor,
    plan: Tensor,
    buffer: Tensor,
    entries: Sequence[int],
    offsets: Sequence[int],
    table: int,
) -> Layout:
    if grad_output.dim() != 2:
        raise ValueError(f"grad_output: expected [T, H], got {list(grad_output.shape)}")
    tokens, width = grad_output.shape
    if grad_output.dtype != buffer.dtype:
        raise ValueError(
            f"grad_output: expected {buffer.dtype}, the dtype of the rows of buffer, got "
            f"{grad_output.dtype}"
        )
    check_tensor("grad_output", grad_output, (tokens, width), buffer.dtype, buffer.device)
    layout = _check_plan(plan, buffer, entries, offsets, width)
    check_offsets("offsets", offsets, tokens)
    if not ALL_TABLES <= table < len(entries):
        raise ValueError(f"table: expected -1 to {len(entries) - 1}, got {table}")
    if may_look(plan):
        _check_values(plan, layout, tokens, buffer, width)
    return layout


def _check_values(plan: Tensor, layout: Layout, tokens: int, buffer: Tensor, width: int) -> None:
    """Refuse numbers that lead beyond a tensor; on a GPU this waits for the device."""
    first, count, task, column = plan[layout.places :].view(_FIELDS, -1)
    is_piece = torch.arange(layout.records, device=plan.device) < layout.pieces[-1]
    kept = is_piece & (task == _IN_SLOT)
    used, slots = count > 0, layout.slots[-1]
    _check_range("a token", plan[: layout.places], tokens)
    _check_range("a piece's place", first[is_piece & used], layout.places)
    _check_range("a run's slot", first[~is_piece & used], slots)
    _check_range("a piece's tokens", count[is_piece], PIECE + 1)
    _check_range("a run's pieces", count[~is_piece], slots + 1)
    _check_range("the end of a piece", (first + count)[is_piece & used], layout.places + 1)
    _check_range("the end of a run", (first + count)[~is_piece & used], slots + 1)
    _check_range("a slot", column[kept & used], slots)
    _check_range("a task", task[~kept & used], len(buffer))
    _check_range("a column", column[~kept & used], buffer.shape[1] - width + 1)


def _check_range(what: str, numbers: Tensor, end: int) -> None:
    if numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < end:
        raise ValueError(
            f"plan: expected for {what} 0 <= index < {end}, got {int(numbers.min())} to "
            f"{int(numbers.max())}"
        )


@torch.library.impl("superbert::add_planned_gradients_", "CPU")
def _cpu(
    grad_output: Tensor,
    plan: Tensor,
    buffer: Tensor,
    entries: Sequence[int],
    offsets: Sequence[int],
    table: int,
) -> None:
    layout = _check_gradients(grad_output, plan, buffer, entries, offsets, table)
    check_rows_apart("buffer", buffer, grad_output=grad_output, plan=plan)
    add_planned_gradients_reference_(grad_output, plan, buffer, layout, table)


@torch.library.impl("superbert::zero_planned_rows_", "CPU")
def _zero_cpu(
    buffer: Tensor, plan: Tensor, entries: Sequence[int], offsets: Sequence[int], width: int
) -> None:
    layout = _check_zeroing(buffer, plan, entries, offsets, width)
    check_rows_apart("buffer", buffer, plan=plan)
    zero_planned_rows_reference_(buffer, plan, layout, width)


def _check_zeroing(
    buffer: Tensor, plan: Tensor, entries: Sequence[int], offsets: Sequence[int], width: int
) -> Layout:
    layout = _check_plan(plan, buffer, entries, offsets, width)
    if may_look(plan):
        _, count, task, column = plan[layout.places :].view(_FIELDS, -1)
        written = (count > 0) & (task != _IN_SLOT)
        _check_range("a task", task[written], len(buffer))
        _check_range("a column", column[written], buffer.shape[1] - width + 1)
    return layout


@register_cuda("add_planned_gradients_")
def _cuda(grad_output: Tensor, plan: Tensor, buffer: Tensor, *given: Any) -> None:
    from . import lookup_plan_triton

    layout = _check_gradients(grad_output, plan, buffer, *given)
    lookup_plan_triton.add_planned_gradients_(grad_output, plan, buffer, layout, given[-1])


@register_cuda("zero_planned_rows_")
def _zero_cuda(buffer: Tensor, plan: Tensor, *given: Any) -> None:
    from . import lookup_plan_triton

    layout = _check_zeroing(buffer, plan, *given)
    lookup_plan_triton.zero_planned_rows_(buffer, plan, layout, given[-1])


def _fake(*_arguments: object) -> None:
    pass


for _name in ("add_planned_gradients_", "zero_planned_rows_"):
    register_fake(_name)(_fake)
    declare(_name, cpu="torch", cuda="triton")


def add_planned_gradients_(
    grad_output: Tensor,
    plan: Tensor,
    buffer: Tensor,
    entries: Sequence[int],
    offsets: Sequence[int],
    table: int = ALL_TABLES,
) -> None:
    """Add to the gradient rows of tables; the sums are computed in float32, in the planned order.

    Args:
        grad_output: dy ``[T, H]``.
        plan: the data of a :class:`LookupPlan`.
        buffer: ``[K, P]`` with contiguous rows, added to.
        entries: the number of rows of each planned table.
        offsets: that the plan was made for.
        table: the number of the one table to add to.
    """
    if buffer.dtype == torch.float64:
        check_data(grad_output=grad_output, plan=plan, buffer=buffer)
        layout = Layout.of(entries, offsets)
        add_planned_gradients_reference_(grad_output, plan, buffer, layout, table)
    else:
        arguments = (grad_output, plan, buffer, entries, offsets, table)
        torch.ops.superbert.add_planned_gradients_(*arguments)


# ---- public -------------------------------------------------------------------------------------


def zero_planned_rows_(buffer: Tensor, plan: LookupPlan, offsets: Sequence[int]) -> None:
    """Zero the gradients of all table rows that a backward pass with this plan added to.

    Args:
        buffer: ``[K, P]`` with contiguous rows, any dtype, in which the plan's columns are.
        plan: on the device of the buffer.
        offsets: ``K + 1`` token numbers that the plan was made for.

    Raises:
        ValueError: a plan of another batch shape, or a storage that was freed.
    """
    if buffer.dtype == torch.float64:
        check_data(buffer=buffer, plan=plan.data)
        layout = Layout.of(plan.entries, offsets)
        zero_planned_rows_reference_(buffer, plan.data, layout, plan.width)
    else:
        torch.ops.superbert.zero_planned_rows_(buffer, plan.data, plan.entries, offsets, plan.width)
