"""Weight and bias gradients of all tasks on the GPU; `kernels.linear.linear` has the maths.

The programs of one launch are the tiles of the weight gradients of up to eight tasks: one by one,
small matrices would fill a third of a GPU.  A program sums over all tokens of its task, in float32
and in their order, and writes its tile once, so that the result has the same bits every time.  The
first programs sum columns of dy for the bias: they start before the products, read what these read,
mostly from the cache, and leave the tensor cores to those beside them.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..token_offsets_triton import decode_opaque_offset, encode_offsets

# Tasks of one launch.
MAX_TASKS = 8


class Tiles(NamedTuple):
    """Tile sizes and launch settings of a product."""

    outputs: int
    inputs: int
    tokens: int
    num_warps: int
    num_stages: int


# By bytes of an element and kind of matrix.  No kernel spills registers, and two programs of the
# largest tile fit on a multiprocessor of an sm_90.  Not timed yet; bench/linear_tiles.py does so.
TILES: dict[tuple[int, str], Tiles] = {
    (2, "thin"): Tiles(16, 128, 32, 4, 3),
    (2, "narrow"): Tiles(64, 64, 32, 4, 3),
    (2, "large"): Tiles(128, 128, 64, 8, 3),
    # float32, for tests alone: on a GPU its products are torch's.
    (4, "thin"): Tiles(16, 64, 16, 4, 2),
    (4, "narrow"): Tiles(32, 64, 32, 4, 2),
    (4, "large"): Tiles(32, 64, 32, 4, 2),
}
# Rows of tiles whose programs follow each other.
GROUP = 8
# Columns that a program sums for a bias, and its warps where there is no product beside it.
BIAS_COLUMNS = 64
BIAS_WARPS = 8
# The most outputs of a thin matrix, the most outputs or inputs of a narrow one.
_THIN, _NARROW = 16, 64
# Numbers that Triton knows to be multiples of it let 16 bytes be read and written at a time.
_ALIGNMENT = 16


def kind_of(rows: Tensor) -> str:
    """Which tiles the gradients ``[K, O, I]`` of a weight are written by."""
    _, outputs, inputs = rows.shape
    if outputs <= _THIN:
        return "thin"
    is_large = min(outputs, inputs) > _NARROW and _is_aligned(rows, inputs)
    return "large" if is_large else "narrow"


def bias_tokens(num_warps: int, element_size: int) -> int:
    """Tokens that a program reads at once for a bias: 128 bytes for each thread."""
    return 128 * 32 * num_warps // (element_size * BIAS_COLUMNS)


def _is_aligned(x: Tensor, width: int) -> bool:
    return all(number % _ALIGNMENT == 0 for number in (x.data_ptr(), x.stride(0), width))


# ---- kernels ------------------------------------------------------------------------------------


@triton.jit
def _tokens_of(task, offsets, MAX_TASKS: tl.constexpr):
    """First token of a task, and the one behind its last."""
    begin, end = decode_opaque_offset(offsets[0]), decode_opaque_offset(offsets[1])
    for number in tl.static_range(1, MAX_TASKS):
        begin = tl.where(task == number, decode_opaque_offset(offsets[number]), begin)
        end = tl.where(task == number, decode_opaque_offset(offsets[number + 1]), end)
    return begin, end


@triton.jit
def _sum_columns(
    program,
    grad,
    grad_stride,
    rows,
    row_stride,
    outputs,
    offsets,
    ACCUMULATE: tl.constexpr,
    MAX_TASKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Write the sums of a block of columns of one task's dy."""
    blocks = tl.cdiv(outputs, BLOCK_O)
    task = program // blocks
    begin, end = _tokens_of(task, offsets, MAX_TASKS)
    columns = program % blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    tokens = tl.arange(0, BLOCK_T)
    sums = tl.zeros([BLOCK_T, BLOCK_O], tl.float32)
    for first in range(begin, end, BLOCK_T):
        pointers = grad + (first + tokens).to(tl.int64)[:, None] * grad_stride + columns[None, :]
        mask = (tokens < end - first)[:, None] & (columns < outputs)[None, :]
        sums += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    # In two steps, since an order that adds one number after the other would round more.
    total = tl.sum(tl.sum(tl.reshape(sums, [8, BLOCK_T // 8, BLOCK_O]), 1), 0)
    pointers = rows + task.to(tl.int64) * row_stride + columns
    if ACCUMULATE:
        total += tl.load(pointers, mask=columns < outputs, other=0.0).to(tl.float32)
    tl.store(pointers, total.to(rows.dtype.element_ty), mask=columns < outputs)


@triton.jit
def _multiply(
    program,
    grad,
    grad_stride,
    grad_columns,
    x,
    x_stride,
    x_columns,
    rows,
    row_stride,
    outputs,
    inputs,
    offsets,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_TASKS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write a tile of one task's ``dy^T x``."""
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    task, place = program // (tiles_o * tiles_i), program % (tiles_o * tiles_i)
    # Tiles of a few rows, column by column: those of one time share what they read in the cache.
    group, place = place // (GROUP * tiles_i), place % (GROUP * tiles_i)
    height = tl.minimum(tiles_o - group * GROUP, GROUP)
    o = (group * GROUP + place % height) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = place // height * BLOCK_I + tl.arange(0, BLOCK_I)

    begin, end = _tokens_of(task, offsets, MAX_TASKS)
    tokens = tl.arange(0, BLOCK_T)
    places = (begin + tokens).to(tl.int64)[:, None]
    grad_pointers = grad + places * grad_stride + o[None, :]
    x_pointers = x + places * x_stride + i[None, :]
    step = tl.full([], BLOCK_T, tl.int64)
    acc = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    for first in range(begin, end, BLOCK_T):
        own = (tokens < end - first)[:, None]
        dy = tl.load(grad_pointers, mask=own & (o < grad_columns)[None, :], other=0.0)
        values = tl.load(x_pointers, mask=own & (i < x_columns)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), values, acc, input_precision=PRECISION)
        grad_pointers += step * grad_stride
        x_pointers += step * x_stride

    if rows.dtype.element_ty != grad.dtype.element_ty:
        acc = acc.to(grad.dtype.element_ty).to(tl.float32)  # as the reference does
    elements = o.to(tl.int64)[:, None] * inputs + i[None, :]
    pointers = rows + task.to(tl.int64) * row_stride + elements
    mask = (o < outputs)[:, None] & (i < inputs)[None, :]
    if ACCUMULATE:
        acc += tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    tl.store(pointers, acc.to(rows.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tasks"])
def gradients_kernel(
    grad,  # [T, outputs]
    grad_stride,
    grad_columns,  # that may be read: outputs, or the multiple of 16 after it
    x,  # [T, inputs]
    x_stride,
    x_columns,
    weight_rows,  # [tasks, outputs, inputs]
    weight_stride,
    bias_rows,  # [tasks, outputs], or None
    bias_stride,
    outputs,
    inputs,
    tasks,
    offsets,  # MAX_TASKS + 1, encoded
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX_TASKS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BIAS_T: tl.constexpr,
    BIAS_O: tl.constexpr,
):
    """Weight gradients, and bias gradients by the first programs."""
    program = tl.program_id(0)
    sums = 0
    if bias_rows is not None:
        sums = tasks * tl.cdiv(outputs, BIAS_O)
        if program < sums:
            _sum_columns(
                *(program, grad, grad_stride, bias_rows, bias_stride, outputs, offsets),
                *(ACCUMULATE, MAX_TASKS, BIAS_T, BIAS_O),
            )
    if program >= sums:
        _multiply(
            *(program - sums, grad, grad_stride, grad_columns, x, x_stride, x_columns),
            *(weight_rows, weight_stride, outputs, inputs, offsets),
            *(ACCUMULATE, PRECISION, MAX_TASKS, GROUP, BLOCK_O, BLOCK_I, BLOCK_T),
        )


@triton.jit
def bias_kernel(
    grad,
    grad_stride,
    bias_rows,
    bias_stride,
    outputs,
    offsets,
    ACCUMULATE: tl.constexpr,
    MAX_TASKS: tl.constexpr,
    BIAS_T: tl.constexpr,
    BIAS_O: tl.constexpr,
):
    """Bias gradients alone."""
    _sum_columns(
        *(tl.program_id(0), grad, grad_stride, bias_rows, bias_stride, outputs, offsets),
        *(ACCUMULATE, MAX_TASKS, BIAS_T, BIAS_O),
    )


# ---- launchers ----------------------------------------------------------------------------------


def _launches(
    offsets: Sequence[int], accumulate: bool
) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Yield the first task of each launch, how many there are, and their encoded offsets."""
    first, last = 0, len(offsets) - 1
    if accumulate:  # to tasks without tokens at either end, of which `task` has many, nothing
        while first < last and offsets[first + 1] == offsets[first]:
            first += 1
        while first < last and offsets[last - 1] == offsets[last]:
            last -= 1
    for begin in range(first, last, MAX_TASKS):
        end = min(begin + MAX_TASKS, last)
        yield begin, end - begin, encode_offsets(offsets[begin : end + 1], MAX_TASKS + 1)


def _with_dense_rows(stream: Tensor) -> Tensor:
    """The stream, or a copy where the elements of a row do not lie side by side."""
    return stream if stream.shape[1] == 1 or stream.stride(1) == 1 else stream.contiguous()


def _with_aligned_rows(stream: Tensor) -> tuple[Tensor, int]:
    """The stream, or where it is read faster, a copy whose rows are longer; and their columns.

    A vocabulary is seldom a multiple of 16, and rows that begin anywhere are read two bytes at a
    time.
    """
    stream = _with_dense_rows(stream)
    width = stream.shape[1]
    if width <= _NARROW or _is_aligned(stream, width):
        return stream, width
    columns = triton.cdiv(width, _ALIGNMENT) * _ALIGNMENT
    copy = stream.new_empty((len(stream), columns))
    copy[:, :width] = stream  # what is read beyond goes into elements that are not written
    return copy, columns


def write_gradients_(
    grad_output: Tensor,
    x: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
) -> None:
    """Write, or add, the gradients of weight ``[K, O, I]`` and bias ``[K, O]``.

    Either has no elements where it is not wanted.
    """
    if weight_rows.numel() == 0:
        write_bias_gradients_(grad_output, bias_rows, offsets, accumulate)
        return
    _, outputs, inputs = weight_rows.shape
    tiles = TILES[x.element_size(), kind_of(weight_rows)]
    products = triton.cdiv(outputs, tiles.outputs) * triton.cdiv(inputs, tiles.inputs)
    sums = triton.cdiv(outputs, BIAS_COLUMNS) if bias_rows.numel() > 0 else 0
    grad, grad_columns = _with_aligned_rows(grad_output)
    x, x_columns = _with_aligned_rows(x)
    for first, tasks, encoded in _launches(offsets, accumulate):
        gradients_kernel[(tasks * (sums + products),)](
            *(grad, grad.stride(0), grad_columns),
            *(x, x.stride(0), x_columns),
            *(weight_rows[first:], weight_rows.stride(0)),
            *((bias_rows[first:], bias_rows.stride(0)) if sums else (None, 0)),
            *(outputs, inputs, tasks, encoded),
            ACCUMULATE=accumulate,
            # float32 is computed as float32, not as TF32.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            MAX_TASKS=MAX_TASKS,
            GROUP=GROUP,
            BLOCK_O=tiles.outputs,
            BLOCK_I=tiles.inputs,
            BLOCK_T=tiles.tokens,
            BIAS_T=bias_tokens(tiles.num_warps, x.element_size()),
            BIAS_O=BIAS_COLUMNS,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )


def write_bias_gradients_(
    grad_output: Tensor, bias_rows: Tensor, offsets: Sequence[int], accumulate: bool
) -> None:
    """Write, or add, the gradients of a bias ``[K, O]``; without elements, nothing."""
    if bias_rows.numel() == 0:
        return
    outputs = bias_rows.shape[1]
    grad = _with_dense_rows(grad_output)
    for first, tasks, encoded in _launches(offsets, accumulate):
        bias_kernel[(tasks * triton.cdiv(outputs, BIAS_COLUMNS),)](
            *(grad, grad.stride(0), bias_rows[first:], bias_rows.stride(0), outputs, encoded),
            ACCUMULATE=accumulate,
            MAX_TASKS=MAX_TASKS,
            BIAS_T=bias_tokens(BIAS_WARPS, grad.element_size()),
            BIAS_O=BIAS_COLUMNS,
            num_warps=BIAS_WARPS,
        )
