"""Embeddings, layer norm and dropout on the GPU; `kernels.embedding_layer_norm` has the maths.

As in `kernels.layer_norm.layer_norm_triton_kernels`, a program takes a few whole rows, and the sums
for weight and bias are added up by task in a fixed order.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments
from ..layer_norm.layer_norm_sums_triton import (
    BackwardGrid,
    GradientRows,
    rows_by_task,
    rows_of_program,
    store_partial,
)
from ..layer_norm.layer_norm_tiles_triton import (
    Parameters,
    grad_of_rows,
    normalize,
    row_factors,
    tile,
)
from ..layer_norm.layer_norm_triton import backward_constants_of, constants_of


class Tables(NamedTuple):
    """Of words, positions and token types: tables ``[N, WIDTH]``, their N, or the rows to take."""

    word: Any
    position: Any
    token_type: Any


@triton.jit
def _table_rows(table, size, index, rows, columns, row_end, mask, WIDTH: tl.constexpr):
    row = tl.load(index + rows, mask=rows < row_end, other=0)
    # A row that the table does not have, which the host must not wait for, is NaN.
    mask &= ((row >= 0) & (row < size))[:, None]
    pointers = table + row[:, None] * WIDTH + columns[None, :]
    return tl.load(pointers, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def _embed(tables, sizes, ids, rows, columns, row_end, mask, WIDTH: tl.constexpr):
    places = (rows, columns, row_end, mask, WIDTH)
    word = _table_rows(tables.word, sizes.word, ids.word, *places)
    position = _table_rows(tables.position, sizes.position, ids.position, *places)
    kind = _table_rows(tables.token_type, sizes.token_type, ids.token_type, *places)
    return word + position + kind


@triton.jit(do_not_specialize=["num_rows", "rng_offset"])
def _forward_kernel(
    tables,
    sizes,
    ids,
    parameters,
    out,
    mean,
    rstd,
    num_rows,
    eps,
    dropout,
    rng_offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, columns, elements, mask = tile(tl.program_id(0) * ROWS, num_rows, N, ROWS, BLOCK_N)
    h = _embed(tables, sizes, ids, rows, columns, num_rows, mask, N)
    y, _, row_mean, row_rstd = normalize(
        h, mask, columns, parameters, eps, HAS_WEIGHT, HAS_BIAS, False, N
    )
    tl.store(mean + rows, row_mean, mask=rows < num_rows)
    tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    if DROPOUT:
        y *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
    tl.store(out + elements, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["log_rows", "rng_offset"])
def _backward_kernel(
    grad_out,
    tables,
    sizes,
    ids,
    weight,
    mean,
    rstd,
    grad_sum,
    partials,  # [programs, SUMS, N]
    boundaries,
    log_rows,
    dropout,
    rng_offset,
    HAS_WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,  # 0: none, 1: for weight, 2: for bias too
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    begin, end = rows_of_program(tl.program_id(0), boundaries, log_rows, SEGMENTS)
    columns = tl.arange(0, BLOCK_N)
    grad_weight = tl.zeros([BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    for first_row in range(begin, end, ROWS):
        rows, columns, elements, mask = tile(first_row, end, N, ROWS, BLOCK_N)
        dy = tl.load(grad_out + elements, mask=mask, other=0.0).to(tl.float32)
        if DROPOUT:
            dy *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
        h = _embed(tables, sizes, ids, rows, columns, end, mask, N)
        w = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_WEIGHT:  # read for each tile: held between them, it would make some widths spill
            w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
        dh, xhat = grad_of_rows(dy, h, w, mean, rstd, rows, end, mask, False, N)
        tl.store(grad_sum + elements, dh.to(grad_sum.dtype.element_ty), mask=mask)
        if SUMS > 0:
            grad_weight += tl.sum(dy * xhat, 0)
        if SUMS > 1:
            grad_bias += tl.sum(dy, 0)
    if SUMS > 0:
        store_partial(partials, grad_weight, 0, columns, N, SUMS)
    if SUMS > 1:
        store_partial(partials, grad_bias, 1, columns, N, SUMS)


# ---- launchers ----------------------------------------------------------------------------------

# Elements of a tile of the forward pass, 8 of each of three tables for a thread: of more, one width
# or another spills on one GPU or another.
TILE_ELEMENTS = 1024


def _sources(tables: tuple[Tensor, ...], ids: tuple[Tensor, ...]) -> tuple[Tables, ...]:
    contiguous = Tables(*(table.contiguous() for table in tables))
    return contiguous, Tables(*map(len, tables)), Tables(*ids)


def forward(
    ids: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    rng_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, mean and rstd; arguments as of the operator."""
    word_ids, word = ids[0], tables[0]
    num_rows, width = word_ids.numel(), word.shape[1]
    out = word.new_empty((num_rows, width))
    mean, rstd = (word.new_empty((num_rows,), dtype=torch.float32) for _ in range(2))
    if num_rows == 0:
        return out, mean, rstd
    constants = constants_of(width, dropout_p, TILE_ELEMENTS)
    _forward_kernel[(triton.cdiv(num_rows, constants["ROWS"]),)](
        *_sources(tables, ids),
        Parameters(weight, bias, None),
        out,
        mean,
        rstd,
        num_rows,
        eps,
        DropoutArguments.of(dropout_p, seed),
        rng_offset,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **constants,
    )
    return out, mean, rstd


def backward(
    grad_out: Tensor,
    ids: tuple[Tensor, ...],
    tables: tuple[Tensor, ...],
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
    dropout_p: float,
    seed: Tensor | None,
    rng_offset: int,
) -> Tensor:
    """Gradient ``[T, H]`` of the sum of the three table rows."""
    grad_out = grad_out.contiguous()
    num_rows, width = grad_out.shape
    grad_sum = torch.empty_like(grad_out)
    sources = _sources(tables, ids)
    dropout = DropoutArguments.of(dropout_p, seed)
    gradient_rows = GradientRows(weight_rows, bias_rows, mean.new_empty(0))
    constants = backward_constants_of(width, dropout_p, gradient_rows)

    def launch(grid: BackwardGrid) -> None:
        _backward_kernel[(grid.programs,)](
            grad_out,
            *sources,
            weight,
            mean,
            rstd,
            grad_sum,
            grid.partials,
            grid.boundaries,
            grid.log_rows,
            dropout,
            rng_offset,
            HAS_WEIGHT=weight is not None,
            **constants,
        )

    parameters = (gradient_rows, offsets, accumulate)
    rows_by_task(launch, num_rows, constants["ROWS"], *parameters, like=grad_sum)
    return grad_sum
