"""Layer norm, and BERT's dropout + residual + norm, on the GPU; `kernels.layer_norm` has the maths.

A program takes a few whole rows at once.  For the gradients of weight and bias every program sums
its rows of one task in registers and writes one partial row; a second kernel adds the partials in
their order, so the result has the same bits every time.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments, element_factors, scattered_factors


class Parameters(NamedTuple):
    """Weight, bias and the bias of x, each ``[N]``; a None is left out by a constexpr flag."""

    weight: Any
    bias: Any
    x_bias: Any


# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def tile(first_row, row_end, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows, columns, element numbers and mask of a tile of whole rows."""
    rows = first_row + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_N)
    elements = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < row_end)[:, None] & (columns < N)[None, :]
    return rows, columns, elements, mask


@triton.jit
def row_factors(rows, rng_offset, dropout, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout factors of whole rows."""
    start = rows.to(tl.int64) * N
    if N % 4 == 0:  # a row starts with a quad
        factors = element_factors(start, rng_offset, dropout, BLOCK_N)
    else:
        elements = start[:, None] + tl.arange(0, BLOCK_N)[None, :]
        factors = scattered_factors(elements, rng_offset, dropout)
    return factors


@triton.jit
def rstd_of(variance, eps):
    """Inverse deviation of a variance that rounding may have made negative; a NaN stays one."""
    return 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)


@triton.jit
def normalize(
    h,
    mask,
    columns,
    parameters,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    N: tl.constexpr,
):
    """Output, centred rows, mean and rstd of a tile of whole rows, the variance in two passes."""
    h = tl.where(mask, h, 0.0)
    rough_mean = tl.sum(h, 1) / N
    deviation = tl.where(mask, h - rough_mean[:, None], 0.0)
    # The second pass also corrects the rounding of the first one's mean.
    correction = tl.sum(deviation, 1) / N
    mean = rough_mean + correction
    rstd = rstd_of(tl.sum(deviation * deviation, 1) / N - correction * correction, eps)
    centred = tl.where(mask, h - mean[:, None], 0.0)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(parameters.weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(parameters.bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    return y, centred, mean, rstd


@triton.jit(do_not_specialize=["num_rows", "rng_offset"])
def _forward_kernel(
    x,
    residual,
    parameters,
    out,
    hidden,
    mean,
    rstd,
    num_rows,
    eps,
    dropout,
    rng_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows, columns, elements, mask = tile(tl.program_id(0) * ROWS, num_rows, N, ROWS, BLOCK_N)
    h = tl.load(x + elements, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        h += tl.load(parameters.x_bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    if DROPOUT:
        h *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
    if HAS_RESIDUAL:
        h += tl.load(residual + elements, mask=mask, other=0.0).to(tl.float32)
    y, centred, row_mean, row_rstd = normalize(
        h, mask, columns, parameters, eps, HAS_WEIGHT, HAS_BIAS, N
    )
    if HAS_RESIDUAL:
        # Kept for the backward pass, and the statistics of what is kept: rounding h itself would
        # leave little but rounding errors of a nearly constant row, whose rstd magnifies them.
        kept = centred.to(hidden.dtype.element_ty)
        tl.store(hidden + elements, kept, mask=mask)
        row_mean = tl.zeros_like(row_mean)
        if kept.dtype != tl.float32:
            centred = kept.to(tl.float32)
            row_mean = tl.sum(centred, 1) / N
            row_rstd = rstd_of(tl.sum(centred * centred, 1) / N - row_mean * row_mean, eps)
    tl.store(mean + rows, row_mean, mask=rows < num_rows)
    tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    tl.store(out + elements, y.to(out.dtype.element_ty), mask=mask)


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def grad_of_rows(dy, h, w, mean, rstd, rows, row_end, mask, N: tl.constexpr):
    """Give dh and xhat of a tile of whole rows."""
    row_mean = tl.load(mean + rows, mask=rows < row_end, other=0.0)
    row_rstd = tl.load(rstd + rows, mask=rows < row_end, other=0.0)
    xhat = tl.where(mask, (h - row_mean[:, None]) * row_rstd[:, None], 0.0)
    g = dy * w[None, :]
    mean_g = tl.sum(g, 1) / N
    mean_gx = tl.sum(g * xhat, 1) / N
    return row_rstd[:, None] * (g - mean_g[:, None] - xhat * mean_gx[:, None]), xhat


@triton.jit(do_not_specialize=["row_begin", "row_end", "rows_per_program", "rng_offset"])
def _backward_kernel(
    grad_out,
    hidden,
    weight,
    mean,
    rstd,
    grad_hidden,
    grad_x,
    partials,  # [programs, 2, N]
    row_begin,
    row_end,
    rows_per_program,
    dropout,
    rng_offset,
    HAS_WEIGHT: tl.constexpr,
    PARTIALS: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    begin = row_begin + program * rows_per_program
    end = tl.minimum(begin + rows_per_program, row_end)
    columns = tl.arange(0, BLOCK_N)
    grad_weight = tl.zeros([BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    w = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    for first_row in range(begin, end, ROWS):
        rows, columns, elements, mask = tile(first_row, end, N, ROWS, BLOCK_N)
        dy = tl.load(grad_out + elements, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(hidden + elements, mask=mask, other=0.0).to(tl.float32)
        dh, xhat = grad_of_rows(dy, h, w, mean, rstd, rows, end, mask, N)
        tl.store(grad_hidden + elements, dh.to(grad_hidden.dtype.element_ty), mask=mask)
        if DROPOUT:
            dx = dh * row_factors(rows, rng_offset, dropout, N, BLOCK_N)
            tl.store(grad_x + elements, dx.to(grad_x.dtype.element_ty), mask=mask)
        if PARTIALS:
            grad_weight += tl.sum(dy * xhat, 0)
            grad_bias += tl.sum(dy, 0)
    if PARTIALS:
        partial = partials + program.to(tl.int64) * 2 * N + columns
        tl.store(partial, grad_weight, mask=columns < N)
        tl.store(partial + N, grad_bias, mask=columns < N)


@triton.jit(do_not_specialize=["programs"])
def _sum_partials_kernel(
    partials,  # [programs, 2, N]
    grad,  # [N]
    programs,
    ACCUMULATE: tl.constexpr,
    WHICH: tl.constexpr,  # 0: weight, 1: bias
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, programs, BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        mask = (program < programs)[:, None] & (columns < N)[None, :]
        elements = (program[:, None] * 2 + WHICH) * N + columns[None, :]
        total += tl.sum(tl.load(partials + elements, mask=mask, other=0.0), 0)
    if ACCUMULATE:
        total += tl.load(grad + columns, mask=columns < N, other=0.0).to(tl.float32)
    tl.store(grad + columns, total.to(grad.dtype.element_ty), mask=columns < N)


# ---- launchers ----------------------------------------------------------------------------------

# Elements of a tile, so that each of a warp's threads holds a few vectors of 16 bytes.
_TILE_ELEMENTS = 4096
# Partial rows of a task's weight gradient: enough programs for every multiprocessor of today's
# GPUs, few enough that their sum is cheap.  A constant, so that the sums do not depend on the GPU.
_MAX_PROGRAMS = 512


def constants_of(width: int, dropout_p: float) -> dict[str, Any]:
    """Constexpr arguments and launch settings for rows of ``width`` columns."""
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, _TILE_ELEMENTS // block)
    return {
        "DROPOUT": dropout_p > 0,
        "N": width,
        "ROWS": rows,
        "BLOCK_N": block,
        "num_warps": 8 if block >= 2048 else 4,
    }


def rows_by_task(
    launch: Callable[[int, int, int, Tensor | None], None],
    num_rows: int,
    rows_at_once: int,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: tuple[int, ...],
    accumulate: bool,
    *,
    like: Tensor,
) -> None:
    """Run a backward kernel task by task, and sum what it gives for weight and bias.

    Args:
        launch: called with a number of programs, the rows ``begin`` to ``end`` that they share, and
            where each leaves its sums (``[programs, 2, N]``; None: nowhere).
        num_rows: rows of the stream; those of no task are run too.
        rows_at_once: rows of a tile.
        weight_rows: ``[K, N]``, written or added to; without elements where not wanted.
        bias_rows: ``[K, N]``, likewise.
        offsets: ``K + 1`` row numbers; not read when neither is wanted.
        accumulate: add to the rows.
        like: ``[..., N]``, tells width and device.
    """

    def run(begin: int, end: int, partials: Tensor | None) -> int:
        programs = min(triton.cdiv(end - begin, rows_at_once), _MAX_PROGRAMS)
        if programs > 0:
            launch(programs, begin, end, partials)
        return programs

    if weight_rows.numel() == bias_rows.numel() == 0:
        run(0, num_rows, None)
        return
    width = like.shape[-1]
    partials = like.new_empty((_MAX_PROGRAMS, 2, width), dtype=torch.float32)
    run(0, offsets[0], None)
    for task, (begin, end) in enumerate(pairwise(offsets)):
        programs = run(begin, end, partials)
        for which, rows in enumerate((weight_rows, bias_rows)):
            if rows.numel() > 0:
                _sum_partials_kernel[(triton.cdiv(width, 64),)](
                    partials, rows[task], programs, accumulate, which, width, 32, 64
                )
    run(offsets[-1], num_rows, None)


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the rows that the backward pass reads, and their mean and rstd.

    Those rows are the centred sums in the dtype of x, or x itself without a residual.
    """
    width = x.shape[-1]
    x = x.contiguous()
    out = torch.empty_like(x)
    hidden = x if residual is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    num_rows = mean.numel()
    if num_rows == 0:
        return out, hidden, mean, rstd
    constants = constants_of(width, dropout_p)
    _forward_kernel[(triton.cdiv(num_rows, constants["ROWS"]),)](
        x,
        None if residual is None else residual.contiguous(),
        Parameters(weight, bias, x_bias),
        out,
        hidden,
        mean,
        rstd,
        num_rows,
        eps,
        DropoutArguments.of(dropout_p, seed),
        rng_offset,
        HAS_RESIDUAL=residual is not None,
        HAS_X_BIAS=x_bias is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **constants,
    )
    return out, hidden, mean, rstd


def backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: tuple[int, ...],
    accumulate: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden rows and of x; without dropout they are one tensor."""
    hidden, grad_out = hidden.contiguous(), grad_out.contiguous()
    num_rows = mean.numel()
    grad_hidden = torch.empty_like(hidden)
    grad_x = torch.empty_like(hidden) if dropout_p > 0 else grad_hidden
    constants = constants_of(hidden.shape[-1], dropout_p)
    dropout = DropoutArguments.of(dropout_p, seed)

    def launch(programs: int, begin: int, end: int, partials: Tensor | None) -> None:
        _backward_kernel[(programs,)](
            grad_out,
            hidden,
            weight,
            mean,
            rstd,
            grad_hidden,
            grad_x,
            partials,
            begin,
            end,
            triton.cdiv(end - begin, programs),
            dropout,
            rng_offset,
            HAS_WEIGHT=weight is not None,
            PARTIALS=partials is not None,
            **constants,
        )

    parameters = (weight_rows, bias_rows, offsets, accumulate)
    rows_by_task(launch, num_rows, constants["ROWS"], *parameters, like=hidden)
    return grad_hidden, grad_x
