"""Launches the Triton kernels of layer norm: tile sizes, grids, what is allocated."""

# Triton's decorated functions are untyped.
# mypy: allow-untyped-calls, ignore-missing-imports

from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments
from .layer_norm_sums_triton import SEGMENTS, BackwardGrid, GradientRows, rows_by_task
from .layer_norm_tiles_triton import Parameters
from .layer_norm_triton_kernels import layer_norm_backward_kernel, layer_norm_forward_kernel

# Elements of a tile, so that each thread holds a few vectors of 16 bytes: in the forward pass 32
# elements of a tensor; in the backward pass 16, for which it needs half as many registers, so that
# four programs share a multiprocessor and wait for memory in turn.
_TILE_ELEMENTS, _BACKWARD_TILE_ELEMENTS = 4096, 2048


def constants_of(
    width: int, dropout_p: float, tile_elements: int = _TILE_ELEMENTS
) -> dict[str, Any]:
    """Constexpr arguments and launch settings of a forward pass over rows of ``width`` columns."""
    constants = _constants_of(width, dropout_p, tile_elements)
    return {**constants, "num_warps": 8 if constants["BLOCK_N"] >= 2048 else 4}


def backward_constants_of(width: int, dropout_p: float, rows: GradientRows) -> dict[str, Any]:
    """Constexpr arguments and launch settings of a backward pass that fills ``rows``."""
    constants = _constants_of(width, dropout_p, _BACKWARD_TILE_ELEMENTS)
    warps = 8 if constants["BLOCK_N"] >= 4096 else 4
    return {**constants, "SUMS": rows.sums, "SEGMENTS": SEGMENTS, "num_warps": warps}


def _constants_of(width: int, dropout_p: float, tile_elements: int) -> dict[str, Any]:
    block = max(16, triton.next_power_of_2(width))
    rows = max(1, tile_elements // block)
    return {"DROPOUT": dropout_p > 0, "N": width, "ROWS": rows, "BLOCK_N": block}


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
    *,
    prenorm: bool = False,
    is_rms_norm: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, the rows that the backward pass reads, and their mean and rstd.

    Those rows are the centred sums in the dtype of x (with ``prenorm`` the sums), or x itself
    without a residual.
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
    layer_norm_forward_kernel[(triton.cdiv(num_rows, constants["ROWS"]),)](
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
        PRENORM=prenorm,
        IS_RMS_NORM=is_rms_norm,
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
    x_bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    *,
    grad_sum: Tensor | None = None,
    is_rms_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradients of the hidden rows and of x; without dropout they are one tensor."""
    hidden, grad_out = hidden.contiguous(), grad_out.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    num_rows = mean.numel()
    grad_hidden = torch.empty_like(hidden)
    grad_x = torch.empty_like(hidden) if dropout_p > 0 else grad_hidden
    dropout = DropoutArguments.of(dropout_p, seed)
    gradient_rows = GradientRows(weight_rows, bias_rows, x_bias_rows)
    constants = backward_constants_of(hidden.shape[-1], dropout_p, gradient_rows)

    def launch(grid: BackwardGrid) -> None:
        layer_norm_backward_kernel[(grid.programs,)](
            grad_out,
            hidden,
            weight,
            mean,
            rstd,
            grad_sum,
            grad_hidden,
            grad_x,
            grid.partials,
            grid.boundaries,
            grid.log_rows,
            dropout,
            rng_offset,
            HAS_WEIGHT=weight is not None,
            HAS_GRAD_SUM=grad_sum is not None,
            IS_RMS_NORM=is_rms_norm,
            **constants,
        )

    parameters = (gradient_rows, offsets, accumulate)
    rows_by_task(launch, num_rows, constants["ROWS"], *parameters, like=hidden)
    return grad_hidden, grad_x
