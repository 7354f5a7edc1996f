"""Tiles of whole rows in Triton: what the kernels of layer norm, and of embeddings, have in common.

`kernels.layer_norm.layer_norm` has the maths.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..dropout.philox_triton import element_factors, scattered_factors


class Parameters(NamedTuple):
    """Weight, bias and the bias of x, each ``[N]``; a None is left out by a constexpr flag."""

    weight: Any
    bias: Any
    x_bias: Any


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
def mean_of(sums, N: tl.constexpr):
    """Give ``sums / N`` within two roundings: ``/`` is a GPU's approximation, `tl.div_rn` slow."""
    return sums * (1.0 / N)


@triton.jit
def rstd_of(variance, eps):
    """Inverse deviation of a variance that rounding may have made negative; a NaN stays one.

    Rounded as the CPU rounds it: ``tl.sqrt``, ``/`` and ``tl.rsqrt`` are a GPU's approximations.
    """
    deviation = tl.sqrt_rn(tl.where(variance < 0.0, 0.0, variance) + eps)
    return tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), deviation)


@triton.jit
def _centre(h, mask, N: tl.constexpr):
    """Give ``h - mean``, mean and variance of a tile of whole rows."""
    rough_mean = mean_of(tl.sum(h, 1), N)
    deviation = tl.where(mask, h - rough_mean[:, None], 0.0)
    # The second pass also corrects the rounding of the first one's mean.
    correction = mean_of(tl.sum(deviation, 1), N)
    mean = rough_mean + correction
    variance = mean_of(tl.sum(deviation * deviation, 1), N) - correction * correction
    return tl.where(mask, h - mean[:, None], 0.0), mean, variance


@triton.jit
def normalize(
    h,
    mask,
    columns,
    parameters,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_RMS_NORM: tl.constexpr,
    N: tl.constexpr,
):
    """Output, centred rows, mean and rstd of a tile of whole rows, the variance in two passes."""
    h = tl.where(mask, h, 0.0)
    if IS_RMS_NORM:
        centred = h
        variance = mean_of(tl.sum(h * h, 1), N)
        mean = tl.zeros_like(variance)
    else:
        centred, mean, variance = _centre(h, mask, N)
    rstd = rstd_of(variance, eps)
    y = centred * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(parameters.weight + columns, mask=columns < N, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(parameters.bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    return y, centred, mean, rstd


@triton.jit
def grad_of_rows(
    dy, h, w, mean, rstd, rows, row_end, mask, IS_RMS_NORM: tl.constexpr, N: tl.constexpr
):
    """Give dh and xhat of a tile of whole rows."""
    row_rstd = tl.load(rstd + rows, mask=rows < row_end, other=0.0)
    if not IS_RMS_NORM:
        row_mean = tl.load(mean + rows, mask=rows < row_end, other=0.0)
        h -= row_mean[:, None]
    xhat = tl.where(mask, h * row_rstd[:, None], 0.0)
    g = dy * w[None, :]
    mean_gx = mean_of(tl.sum(g * xhat, 1), N)
    if not IS_RMS_NORM:
        g -= mean_of(tl.sum(g, 1), N)[:, None]
    return row_rstd[:, None] * (g - xhat * mean_gx[:, None]), xhat
