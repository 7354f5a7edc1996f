"""Check the operators that end in a layer norm, whose CUDA side is Python."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dropout.dropout import check_seed
from ..registration.validation import (
    check_data,
    check_kernel_dtype,
    check_number,
    check_offsets,
    check_tensor,
)
from .layer_norm_parameters import check_parameter


def check_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> None:
    """Check what the forward passes that end in a layer norm are given."""
    _check_hidden("x", x)
    check_number("eps", eps)
    for name, parameter in (("weight", weight), ("bias", bias), ("x_bias", x_bias)):
        check_parameter(name, parameter, x)
        check_data(**{name: parameter})
    if residual is not None:
        check_tensor("residual", residual, x.shape, x.dtype, x.device)
    check_seed(dropout_p, seed, rng_offset, x.device)


def check_norm_backward(
    grad_out: Tensor,
    hidden: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    x_bias_rows: Tensor | None,
    offsets: Sequence[int],
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    *,
    grad_sum: Tensor | None = None,
) -> None:
    """Check what the backward passes are given; ``hidden`` may be any rows of that shape.

    ``x_bias_rows`` is None for an operator that has none.
    """
    _check_hidden("hidden", hidden)
    check_tensor("grad_out", grad_out, hidden.shape, hidden.dtype, hidden.device)
    if grad_sum is not None:
        check_tensor("grad_sum", grad_sum, hidden.shape, hidden.dtype, hidden.device)
    check_parameter("weight", weight, hidden)
    check_data(weight=weight)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        check_tensor(name, statistic, hidden.shape[:-1], torch.float32, hidden.device)
        if not statistic.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor")
    check_offsets("offsets", offsets, mean.numel())
    given = {"weight_rows": weight_rows, "bias_rows": bias_rows, "x_bias_rows": x_bias_rows}
    for name, rows in given.items():
        if rows is not None and rows.numel() > 0:
            _check_rows(name, rows, hidden, len(offsets) - 1)
    check_seed(dropout_p, seed, rng_offset, hidden.device)


def _check_hidden(name: str, x: Tensor) -> None:
    check_kernel_dtype(name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., width], got {list(x.shape)}")
    check_data(**{name: x})


def _check_rows(name: str, rows: Tensor, hidden: Tensor, tasks: int) -> None:
    width = hidden.shape[-1]
    check_kernel_dtype(name, rows)
    check_tensor(name, rows, (tasks, width), rows.dtype, hidden.device)
    if (width > 1 and rows.stride(1) != 1) or (tasks > 1 and rows.stride(0) < width):
        raise ValueError(f"{name}: expected rows that lie apart, with contiguous columns")
