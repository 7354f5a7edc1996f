"""Gated activations on the GPU; `kernels.gated_activation.gated_activation` has the maths.

The activations are computed as on the CPU (csrc/gated_activation_simd.cpp): by one exponential,
which carries a factor of 2^64 until it is multiplied by x, and for GELU by erf a polynomial.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments, element_factors, scattered_factors

TILE_ELEMENTS = 1024
"""Outputs of a program: 8 for each of its threads."""

_SCALE: tl.constexpr = tl.constexpr(2.0**64)
_UNSCALE: tl.constexpr = tl.constexpr(2.0**-64)
_LARGEST: tl.constexpr = tl.constexpr(110.0)


@triton.jit
def _scaled_exponential(x, rest):
    """``2^64 exp(-(x + rest))``; x is at least 0, rest tiny."""
    power = tl.where(x > _LARGEST, -_LARGEST, -x)  # a NaN stays one
    shifted = power * 1.44269504 + 12582912.0  # 1.5 * 2^23: adding it rounds to an integer
    n = shifted - 12582912.0
    r = (power - n * 0.693145752) - n * 1.42860677e-6 - rest
    p = r * (1.0 / 5040) + 1.0 / 720
    p = p * r + 1.0 / 120
    p = p * r + 1.0 / 24
    p = p * r + 1.0 / 6
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    two_to_n = (shifted.to(tl.int32, bitcast=True) - 0x4B400000 + 191) << 23
    return tl.where(x > _LARGEST, 0.0, p * two_to_n.to(tl.float32, bitcast=True))


@triton.jit
def _gelu(x):
    size = tl.abs(x)
    t = tl.where(size > 15.0, 15.0, size)
    # The square in two parts: a rounding of it would be one of the exponential, 87 times as large.
    high = (t.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    density = _scaled_exponential(high * high * 0.5, (t - high) * (t + high) * 0.5)
    inverse = 1.0 / (t + 4.0)
    q = (t - 4.0) * inverse
    p = q * -1.23515358e-4 + 1.93591067e-4
    p = p * q + 1.56878482e-3
    p = p * q - 3.52305197e-3
    p = p * q - 7.52683328e-3
    p = p * q + 6.04064167e-2
    p = p * q - 1.86523065e-1
    p = p * q + 3.87136668e-1
    p = p * q - 6.07896626e-1
    p = p * q + 7.55285144e-1
    ratio = p * inverse
    lower = density * ratio  # 2^64 Phi(-t)
    value = tl.where(x < 0, (x * lower) * _UNSCALE, x * (1.0 - lower * _UNSCALE))
    slope = density * (ratio - t * 0.398942280) * _UNSCALE  # Phi(-t) - t phi(t)
    return value, tl.where(x < 0, slope, 1.0 - slope)


@triton.jit
def _times_sigmoid(x, bounded, w, w_derivative):
    """``x sigmoid(w)`` and its derivative; bounded: x, as large as where sigmoid is 0 or 1."""
    scaled = _scaled_exponential(tl.abs(w), 0.0)
    total = 1.0 + scaled * _UNSCALE
    inverse = 1.0 / total
    lower = scaled * _UNSCALE * inverse  # sigmoid(-|w|)
    sigmoid = tl.where(w < 0, lower, inverse)
    value = tl.where(x < 0, x * scaled / total * _UNSCALE, x / total)
    return value, sigmoid + bounded * w_derivative * lower * inverse


@triton.jit
def _clamped(x, most):
    return tl.where(x > most, most, tl.where(x < -most, -most, x))


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """An activation's value and its derivative."""
    if ACTIVATION == 0:
        value, derivative = _gelu(x)
    elif ACTIVATION == 1:
        bounded = _clamped(x, 30.0)
        square = bounded * bounded
        w = bounded * 1.59576912 * (1.0 + 0.044715 * square)
        w_derivative = 1.59576912 * (1.0 + 3 * 0.044715 * square)
        value, derivative = _times_sigmoid(x, bounded, w, w_derivative)
    else:
        bounded = _clamped(x, 220.0)
        value, derivative = _times_sigmoid(x, bounded, bounded, 1.0)
    return value, derivative


@triton.jit
def _tile(num_rows, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of a program: its first outputs, places of a, places of outputs, and mask."""
    blocks: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first_column = program % blocks * COLUMNS
    columns = first_column + tl.arange(0, COLUMNS)
    first = rows * N + first_column
    halves = rows[:, None] * (2 * N) + columns[None, :]
    outputs = rows[:, None] * N + columns[None, :]
    return first, halves, outputs, (rows < num_rows)[:, None] & (columns < N)[None, :]


@triton.jit
def _factors(first, outputs, rng_offset, dropout, N: tl.constexpr, COLUMNS: tl.constexpr):
    if N % 4 == 0:  # a row starts with a quad
        factors = element_factors(first, rng_offset, dropout, COLUMNS)
    else:
        factors = scattered_factors(outputs, rng_offset, dropout)
    return factors


@triton.jit(do_not_specialize=["num_rows", "rng_offset"])
def gated_forward_kernel(
    x,
    out,
    num_rows,
    dropout,
    rng_offset,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Outputs of a tile."""
    first, halves, outputs, mask = _tile(num_rows, N, ROWS, COLUMNS)
    a = tl.load(x + halves, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + N + halves, mask=mask, other=0.0).to(tl.float32)
    value, _ = _activate(a, ACTIVATION)
    y = (value * b).to(out.dtype.element_ty)
    if DROPOUT:
        factors = _factors(first, outputs, rng_offset, dropout, N, COLUMNS)
        y = (y.to(tl.float32) * factors).to(out.dtype.element_ty)
    tl.store(out + outputs, y, mask=mask)


@triton.jit(do_not_specialize=["num_rows", "rng_offset"])
def gated_backward_kernel(
    grad_out,
    x,
    grad_x,
    num_rows,
    dropout,
    rng_offset,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of both halves of x, of a tile of outputs."""
    first, halves, outputs, mask = _tile(num_rows, N, ROWS, COLUMNS)
    dy = tl.load(grad_out + outputs, mask=mask, other=0.0).to(tl.float32)
    if DROPOUT:
        dy *= _factors(first, outputs, rng_offset, dropout, N, COLUMNS)
        dy = dy.to(grad_out.dtype.element_ty).to(tl.float32)
    a = tl.load(x + halves, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + N + halves, mask=mask, other=0.0).to(tl.float32)
    value, derivative = _activate(a, ACTIVATION)
    grad_a, grad_b = dy * b * derivative, dy * value
    tl.store(grad_x + halves, grad_a.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_x + N + halves, grad_b.to(grad_x.dtype.element_ty), mask=mask)


# ---- launchers ----------------------------------------------------------------------------------


def constants_of(width: int, activation: int, dropout_p: float) -> dict[str, Any]:
    """Compile-time constants for rows of a width.

    A tile has the most columns of a row of which at most an eighth go beyond its end.
    """
    columns = TILE_ELEMENTS
    while columns > 64 and 8 * (-width % columns) > width:
        columns //= 2
    return {
        "ACTIVATION": activation,
        "DROPOUT": dropout_p > 0,
        "N": width,
        "ROWS": TILE_ELEMENTS // columns,
        "COLUMNS": columns,
    }


def _programs(num_rows: int, constants: dict[str, Any]) -> int:
    blocks = triton.cdiv(constants["N"], constants["COLUMNS"])
    return triton.cdiv(num_rows, constants["ROWS"]) * blocks


def forward(
    x: Tensor, activation: int, dropout_p: float, seed: Tensor | None, rng_offset: int
) -> Tensor:
    """Output ``[..., I]``; arguments as of the operator."""
    x, width = x.contiguous(), x.shape[-1] // 2
    out = x.new_empty((*x.shape[:-1], width))
    if out.numel() == 0:
        return out
    num_rows, constants = out.numel() // width, constants_of(width, activation, dropout_p)
    gated_forward_kernel[(_programs(num_rows, constants),)](
        *(x, out, num_rows, DropoutArguments.of(dropout_p, seed), rng_offset), **constants
    )
    return out


def backward(
    grad_out: Tensor,
    x: Tensor,
    activation: int,
    dropout_p: float,
    seed: Tensor | None,
    rng_offset: int,
) -> Tensor:
    """Gradient ``[..., 2 I]`` of x; arguments as of the operator."""
    x, grad_out, width = x.contiguous(), grad_out.contiguous(), x.shape[-1] // 2
    grad_x = torch.empty_like(x)
    if grad_out.numel() == 0:
        return grad_x
    num_rows, constants = grad_out.numel() // width, constants_of(width, activation, dropout_p)
    dropout = DropoutArguments.of(dropout_p, seed)
    gated_backward_kernel[(_programs(num_rows, constants),)](
        *(grad_out, x, grad_x, num_rows, dropout, rng_offset), **constants
    )
    return grad_x
