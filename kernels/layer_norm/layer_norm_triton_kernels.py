"""Layer norm, and BERT's dropout + residual + norm, on the GPU; `kernels.layer_norm` has the maths.

A program takes a few whole rows at once.  `kernels.layer_norm.layer_norm_sums_triton` adds up, by
task, what the programs of the backward pass sum for the gradients of the parameters.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

import triton
import triton.language as tl

from .layer_norm_sums_triton import rows_of_program, store_partial
from .layer_norm_tiles_triton import (
    grad_of_rows,
    mean_of,
    normalize,
    row_factors,
    rstd_of,
    tile,
)


@triton.jit(do_not_specialize=["num_rows", "rng_offset"])
def layer_norm_forward_kernel(
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
    PRENORM: tl.constexpr,
    IS_RMS_NORM: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Output, the rows that the backward pass reads, and their statistics."""
    rows, columns, elements, mask = tile(tl.program_id(0) * ROWS, num_rows, N, ROWS, BLOCK_N)
    h = tl.load(x + elements, mask=mask, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        h += tl.load(parameters.x_bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    if DROPOUT:
        h *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
    if HAS_RESIDUAL:
        h += tl.load(residual + elements, mask=mask, other=0.0).to(tl.float32)
    if PRENORM:
        # The sum is given out, too: the norm and its statistics are those of the rounded rows.
        summed = h.to(hidden.dtype.element_ty)
        tl.store(hidden + elements, summed, mask=mask)
        h = summed.to(tl.float32)
    y, centred, row_mean, row_rstd = normalize(
        h, mask, columns, parameters, eps, HAS_WEIGHT, HAS_BIAS, IS_RMS_NORM, N
    )
    if HAS_RESIDUAL and not PRENORM:
        # Kept for the backward pass, and the statistics of what is kept: rounding h itself would
        # leave little but rounding errors of a nearly constant row, whose rstd magnifies them.
        kept = centred.to(hidden.dtype.element_ty)
        tl.store(hidden + elements, kept, mask=mask)
        row_mean = tl.zeros_like(row_mean)
        if kept.dtype != tl.float32:
            centred = kept.to(tl.float32)
            if not IS_RMS_NORM:
                row_mean = mean_of(tl.sum(centred, 1), N)
            square = mean_of(tl.sum(centred * centred, 1), N)
            row_rstd = rstd_of(square - row_mean * row_mean, eps)
    tl.store(mean + rows, row_mean, mask=rows < num_rows)
    tl.store(rstd + rows, row_rstd, mask=rows < num_rows)
    tl.store(out + elements, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["log_rows", "rng_offset"])
def layer_norm_backward_kernel(
    grad_out,
    hidden,
    weight,
    mean,
    rstd,
    grad_sum,
    grad_hidden,
    grad_x,
    partials,  # [programs, SUMS, N]
    boundaries,
    log_rows,
    dropout,
    rng_offset,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRAD_SUM: tl.constexpr,
    IS_RMS_NORM: tl.constexpr,
    SUMS: tl.constexpr,  # 0: none, 1: for weight, 2: for bias too, 3: for x_bias too
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Gradients of a program's rows, and its sums for the parameters."""
    begin, end = rows_of_program(tl.program_id(0), boundaries, log_rows, SEGMENTS)
    columns = tl.arange(0, BLOCK_N)
    grad_weight = tl.zeros([BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    grad_x_bias = tl.zeros([BLOCK_N], tl.float32)
    w = tl.full([BLOCK_N], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    for first_row in range(begin, end, ROWS):
        rows, columns, elements, mask = tile(first_row, end, N, ROWS, BLOCK_N)
        dy = tl.load(grad_out + elements, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(hidden + elements, mask=mask, other=0.0).to(tl.float32)
        dh, xhat = grad_of_rows(dy, h, w, mean, rstd, rows, end, mask, IS_RMS_NORM, N)
        if SUMS > 0:
            grad_weight += tl.sum(dy * xhat, 0)
        if SUMS > 1:
            grad_bias += tl.sum(dy, 0)
        if HAS_GRAD_SUM:  # the last to be loaded, when dy and xhat need no registers any more
            dh += tl.load(grad_sum + elements, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_hidden + elements, dh.to(grad_hidden.dtype.element_ty), mask=mask)
        if DROPOUT:
            dh *= row_factors(rows, rng_offset, dropout, N, BLOCK_N)
            tl.store(grad_x + elements, dh.to(grad_x.dtype.element_ty), mask=mask)
        if SUMS == 3:
            grad_x_bias += tl.sum(dh, 0)
    if SUMS > 0:
        store_partial(partials, grad_weight, 0, columns, N, SUMS)
    if SUMS > 1:
        store_partial(partials, grad_bias, 1, columns, N, SUMS)
    if SUMS == 3:
        store_partial(partials, grad_x_bias, 2, columns, N, SUMS)
