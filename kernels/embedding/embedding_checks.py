"""Check the operators that look up tables, whose CUDA side is Python."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registration.validation import (
    are_checked,
    check_data,
    check_index,
    check_kernel_dtype,
    check_offsets,
    check_tensor,
)


def check_embedded(ids: Sequence[Tensor], tables: Sequence[Tensor]) -> None:
    """Check three indices ``[T]`` against the tables ``[N, H]`` that they look up."""
    names = ("word", "position", "token_type")
    word = tables[0]
    check_kernel_dtype("word", word)
    for name, table, index in zip(names, tables, ids, strict=True):
        if table.dim() != 2 or table.shape[1] == 0:
            raise ValueError(f"{name}: expected [rows, width], got {list(table.shape)}")
        check_tensor(name, table, (len(table), word.shape[1]), word.dtype, word.device)
        _check_ids(f"{name}_ids", index, ids[0].numel(), table)


def check_padding(padding: Sequence[int], tables: Sequence[Tensor]) -> None:
    """Check the row of each table whose lookups give no gradient, -1 for none."""
    if len(padding) != len(tables):
        raise ValueError("padding: expected a row of each table, or -1")
    for number, (row, table) in enumerate(zip(padding, tables, strict=True)):
        if not -1 <= row < len(table):
            raise ValueError(
                f"padding: expected -1 <= row < {len(table)}, got {row} for table {number}"
            )


def check_embedding_gradients(
    grad_output: Tensor, index: Tensor, rows: Tensor, offsets: Sequence[int]
) -> None:
    """Check rows ``[K, N, H]`` that the gradients of looked up rows are added to."""
    check_kernel_dtype("rows", rows)
    sizes, strides = rows.shape, rows.stride()
    if rows.dim() != 3 or (
        (sizes[2] > 1 and strides[2] != 1)
        or (sizes[1] > 1 and strides[1] != sizes[2])
        or (sizes[0] > 1 and strides[0] < sizes[1] * sizes[2])
    ):
        raise ValueError("rows: expected [tasks, N, H] with contiguous tables that lie apart")
    check_data(rows=rows)
    _check_ids("index", index, index.numel(), rows[0] if len(rows) else rows.new_empty(0))
    check_tensor("grad_output", grad_output, (len(index), sizes[2]), rows.dtype, rows.device)
    if len(offsets) not in (0, len(rows) + 1):
        raise ValueError("offsets: expected tasks + 1 row numbers")
    check_offsets("offsets", offsets, len(index))


def _check_ids(name: str, index: Tensor, tokens: int, table: Tensor) -> None:
    check_tensor(name, index, (tokens,), torch.int64, table.device)
    if not index.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")
    if are_checked(table):
        check_index(name, index, len(table))
