"""Rows of a matrix on the GPU; `kernels.take_rows.take_rows` has the maths.

A program copies up to 1,024 columns of one row.  An index outside of the matrix, which the host
must not wait for, reads zeros and is written nowhere.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["num_rows"])
def take_rows_kernel(x, index, out, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Read ``x [num_rows, WIDTH]`` at an index; write the next row of ``out``."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(index + number)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (columns < WIDTH) & (row >= 0) & (row < num_rows)
    values = tl.load(x + row * WIDTH + columns, mask=mask, other=0.0)
    tl.store(out + number * WIDTH + columns, values, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["num_rows"])
def write_rows_kernel(grad, index, out, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Read the next row of ``grad``; write ``out [num_rows, WIDTH]`` at an index."""
    number = tl.program_id(0).to(tl.int64)
    row = tl.load(index + number)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (columns < WIDTH) & (row >= 0) & (row < num_rows)
    values = tl.load(grad + number * WIDTH + columns, mask=mask, other=0.0)
    tl.store(out + row * WIDTH + columns, values, mask=mask)


def forward(x: Tensor, index: Tensor) -> Tensor:
    """Launch the forward kernel."""
    rows, width = x.shape
    out = x.new_empty((len(index), width))
    if out.numel():
        grid = (len(index), triton.cdiv(width, BLOCK))
        take_rows_kernel[grid](x.contiguous(), index.contiguous(), out, rows, width, BLOCK)
    return out


def backward(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Launch the backward kernel on zeros."""
    width = grad.shape[1]
    out = grad.new_zeros((num_rows, width))
    if grad.numel() and num_rows:
        grid = (len(index), triton.cdiv(width, BLOCK))
        write_rows_kernel[grid](grad.contiguous(), index.contiguous(), out, num_rows, width, BLOCK)
    return out
