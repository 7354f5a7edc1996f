"""Check the parameters of a layer norm, and write their task gradients.

Every operator that ends in a layer norm takes its task rows as arguments ``rows, columns, offsets,
accumulate`` (the gradient buffer, and the first columns of its parameters) and writes them in its
backward pass.  Without task rows it writes one gradient over the whole stream, which autograd gets.
"""

from typing import Any

import torch
from torch import Tensor

from ..registration.validation import DTYPES
from ..task_rows import NO_COLUMN, TaskRows, TaskSegments, rows_at, rows_of


def check_parameter(name: str, parameter: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless ``parameter`` is None or ``[N]`` beside rows ``x [..., N]``."""
    if parameter is None:
        return
    if parameter.shape != x.shape[-1:]:
        raise ValueError(f"{name}: expected [{x.shape[-1]}], got {list(parameter.shape)}")
    if parameter.device != x.device:
        raise ValueError(f"{name}: expected on {x.device}, got {parameter.device}")
    if parameter.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a floating dtype, got {parameter.dtype}")


def task_arguments(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: TaskRows | None,
    segments: TaskSegments | None,
    x_bias: Tensor | None = None,
    name: str = "x",
) -> tuple[Tensor | None, tuple[int, ...], tuple[int, ...], bool]:
    """Check the arguments that all functions share; return the operators' arguments on tasks."""
    if x.dim() == 0 or x.shape[-1] == 0 or x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected floating [..., width], got {x.dtype} {list(x.shape)}")
    check_parameter("weight", weight, x)
    check_parameter("bias", bias, x)
    check_parameter("x_bias", x_bias, x)
    if rows is None:
        return None, (), (), False
    if weight is None or x.dim() != 2:
        raise ValueError(f"rows: task gradients need a weight and {name} of [tokens, width]")
    segments = rows.checked(segments, weight, bias, x, x_bias)
    return rows.buffer, rows.starts, segments.offsets, segments.accumulate


def save(ctx: Any, tensors: tuple[Tensor | None, ...], arguments: list[Any]) -> None:
    """Keep what the backward pass needs; ``arguments`` are those of :func:`task_arguments`."""
    ctx.save_for_backward(*tensors)
    # Not a saved tensor: each backward overwrites it, which is its purpose.
    ctx.rows, ctx.columns, ctx.offsets, ctx.accumulate = arguments


def parameter_rows(
    ctx: Any, weight: Tensor | None, bias: Tensor | None, mean: Tensor, *, first: int = 0
) -> tuple[Tensor, Tensor, tuple[int, ...], bool]:
    """Return the rows for the gradients of weight and bias: the task rows, or a new row for a sum.

    ``first`` is the place of the weight's column among the operator's columns.  A tensor without
    elements stands for a missing parameter (`kernels.task_rows.rows_of`).

    Raises:
        ValueError: a hook on saved tensors changed the shape of the bias, which no kernel reads.
    """
    if bias is not None and (
        bias.dim() != 1 or len(bias) != len(bias if weight is None else weight)
    ):
        raise ValueError(f"bias: expected the shape of weight, got {list(bias.shape)}")
    if ctx.rows is not None:
        columns = ctx.columns[first : first + 2]
        weight_rows, bias_rows = map(rows_of, (ctx.rows,) * 2, columns, (weight, bias))
        return weight_rows, bias_rows, ctx.offsets, ctx.accumulate
    fresh = [mean.new_empty(0) if p is None else p.new_empty((1, len(p))) for p in (weight, bias)]
    return fresh[0], fresh[1], (0, mean.numel()), False


def parameter_gradients(
    ctx: Any, weight_rows: Tensor, bias_rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Return autograd's gradients of weight and bias: None when they are in the task rows."""
    if ctx.rows is not None:
        return None, None
    weight, bias = (rows[0] if rows.numel() > 0 else None for rows in (weight_rows, bias_rows))
    return weight, bias


def save_x_bias(ctx: Any, x_bias: Tensor | None) -> None:
    """Keep what tells the gradients of the bias of x; no kernel needs its values."""
    ctx.x_bias = None if x_bias is None else (x_bias.shape, x_bias.dtype)


def x_bias_rows(ctx: Any, mean: Tensor) -> Tensor:
    """Return the rows for the gradients of the bias of x, as :func:`parameter_rows` does."""
    if ctx.x_bias is None:
        return mean.new_empty(0)
    shape, dtype = ctx.x_bias
    if ctx.rows is not None:
        column = ctx.columns[2]
        return mean.new_empty(0) if column == NO_COLUMN else rows_at(ctx.rows, column, shape)
    if not ctx.needs_input_grad[2]:
        return mean.new_empty(0)
    return mean.new_empty((1, *shape), dtype=torch.float32 if dtype == torch.float64 else dtype)


def x_bias_gradient(ctx: Any, rows: Tensor) -> Tensor | None:
    """Return autograd's gradient of the bias of x: None when it is in the task rows."""
    if ctx.rows is not None or rows.numel() == 0:
        return None
    return rows[0].to(ctx.x_bias[1])
