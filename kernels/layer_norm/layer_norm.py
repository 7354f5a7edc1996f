"""Layer norm and RMS norm, alone and after a transformer's dropout and residual.

    h = residual + dropout(x + x_bias)        or h = x
    mean, var over the last dimension,  rstd = 1 / sqrt(var + eps),  xhat = (h - mean) rstd
    y = xhat weight + bias

    g = dy weight
    dh = rstd (g - mean(g) - xhat mean(g xhat)),  dx = dropout factor * dh
    dweight_k = sum of dy xhat, dbias_k = sum of dy, dx_bias_k = sum of dx, over the rows of task k

RMS norm takes 0 for the mean: ``rstd = 1 / sqrt(mean(h^2) + eps)``, ``xhat = h rstd`` and
``dh = rstd (g - xhat mean(g xhat))``.  A pre-norm also returns h, whose gradient is added to dh.

Rows are computed in float32 whatever their dtype, the variance in two passes, and the statistics
are kept in float32.  For a sum, the forward pass saves ``h - mean`` in the rows' dtype with the
statistics of these rounded rows.  The gradient is then that at a point that differs from h by a
rounding of each deviation, so it is right for rows that are nearly constant too.  A pre-norm rounds
h to the rows' dtype first and saves that: its norm, statistics and gradient are those of the sum it
returns.

With task rows (:class:`TaskRows`) the backward pass writes the K gradients of weight, bias and
x_bias there; without them it returns their sum, the usual gradient.  The bias of a linear layer
before the norm can be its x_bias: the gradients are sums of rows that this pass holds anyway.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (registers the operators)
from ..dropout.dropout import check_dropout, dropout, new_seed
from ..linear.linear import linear_task_gradients_
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.deprecation import renamed_argument
from ..registration.differentiation import (
    differentiable_once,
    refuse_transforms,
    refuse_vmap,
    register_derivative,
)
from ..registration.validation import check_data, check_number
from ..task_rows import TaskRows, TaskSegments, first_column, rows_at
from .layer_norm_checks import check_norm, check_norm_backward
from .layer_norm_parameters import (
    parameter_gradients,
    parameter_rows,
    save,
    save_x_bias,
    task_arguments,
    x_bias_gradient,
    x_bias_rows,
)

_ops = torch.ops.superbert


# ---- reference ----------------------------------------------------------------------------------


def normalize_reference(hidden: Tensor, eps: float, is_rms_norm: bool = False) -> Tensor:
    """``xhat``: the rows of ``hidden`` with mean 0 and variance 1, in its dtype.

    With ``is_rms_norm`` those with a mean square of 1.
    """
    centred = hidden if is_rms_norm else hidden - hidden.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


class _TaskAffine(torch.autograd.Function):
    """``xhat weight + bias`` whose backward writes task rows; plain torch."""

    @staticmethod
    def forward(
        ctx: Any,
        xhat: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: TaskRows,
        segments: TaskSegments,
    ) -> Tensor:
        ctx.save_for_backward(xhat, weight)
        ctx.rows, ctx.segments = rows, segments
        scaled = xhat * weight
        return scaled if bias is None else scaled + bias

    @staticmethod
    @differentiable_once("layer_norm with task rows", "the layer without rows")
    def backward(ctx: Any, saved: tuple[Tensor, Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
        xhat, weight = saved
        (offsets, accumulate), rows = ctx.segments, (ctx.rows.weight, ctx.rows.bias)
        for task, (begin, end) in enumerate(pairwise(offsets)):
            for own, term in zip(rows, (grad * xhat, grad), strict=True):
                if own is not None:
                    row = own[task]
                    row.copy_(term[begin:end].sum(0) + (row if accumulate else 0))
        return grad * weight, None, None, None, None


class _TaskBias(torch.autograd.Function):
    """``x + x_bias`` whose backward writes task rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        x_bias: Tensor,
        buffer: Tensor,
        start: int,
        offsets: tuple[int, ...],
        accumulate: bool,
    ) -> Tensor:
        ctx.x_dtype, ctx.shape = x.dtype, x_bias.shape
        # Not a saved tensor: each backward overwrites it, which is its purpose.
        ctx.rows, ctx.segments = (buffer, start), (offsets, accumulate)
        return x + x_bias

    @staticmethod
    @differentiable_once("dropout_add_layer_norm with task rows", "the layer without rows")
    def backward(ctx: Any, _saved: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
        buffer, start = ctx.rows
        bias_rows = rows_at(buffer, start, ctx.shape)
        linear_task_gradients_(grad, grad, grad.new_empty(0), bias_rows, *ctx.segments)
        return grad.to(ctx.x_dtype), None, None, None, None, None


def _with_x_bias(
    x: Tensor, x_bias: Tensor | None, rows: TaskRows | None, segments: TaskSegments | None
) -> Tensor:
    """``x + x_bias``, whose gradients go into the rows where these have columns for them."""
    if x_bias is None:
        return x
    if rows is None or segments is None or rows.x_bias_columns is None:
        return x + x_bias
    refuse_transforms("dropout_add_layer_norm", x, x_bias)
    start = rows.x_bias_columns.start
    return _TaskBias.apply(x, x_bias, rows.buffer, start, *segments)  # type: ignore[no-untyped-call]


def layer_norm_reference(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
    is_rms_norm: bool = False,
) -> Tensor:
    """``y`` by plain torch operations, in the dtype of ``hidden``."""
    xhat = normalize_reference(hidden, eps, is_rms_norm)
    if rows is not None:
        refuse_transforms("rms_norm" if is_rms_norm else "layer_norm", xhat, weight, bias)
        return _TaskAffine.apply(xhat, weight, bias, rows, segments)  # type: ignore[no-untyped-call]
    scaled = xhat if weight is None else xhat * weight
    return scaled if bias is None else scaled + bias


# ---- registration -------------------------------------------------------------------------------


def _statistic(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _layer_norm_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _statistic(x), _statistic(x)


def _layer_norm_backward_fake(_grad_out: Tensor, hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape)


def _add_fake(x: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _statistic(x), _statistic(x)


def _add_backward_fake(_grad_out: Tensor, hidden: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape)


def _layer_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, _eps, *task_arguments, ctx.is_rms_norm = inputs
    _, mean, rstd = output
    save(ctx, (x, weight, bias, mean, rstd), task_arguments)
    ctx.mark_non_differentiable(mean, rstd)


_INSTEAD = "torch.nn.functional.layer_norm, or float64"


@differentiable_once("layer_norm", _INSTEAD)
def _layer_norm_backward(
    ctx: Any, saved: tuple[Tensor, ...], grad_out: Tensor, *_: Tensor
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, mean, rstd = saved
    task_arguments = parameter_rows(ctx, weight, bias, mean)
    gradient_rows, segments = task_arguments[:2], task_arguments[2:]
    arguments = (grad_out, hidden, weight, mean, rstd, *gradient_rows, mean.new_empty(0), *segments)
    grad = _ops.layer_norm_backward(*arguments, None, ctx.is_rms_norm)
    return grad, *parameter_gradients(ctx, *gradient_rows), *[None] * 6


def _add_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _x, _residual, x_bias, weight, bias, ctx.dropout_p, _eps, ctx.seed, ctx.rng_offset, *rest = (
        inputs
    )
    *task_arguments, ctx.prenorm, ctx.is_rms_norm = rest
    _, hidden, mean, rstd = output
    save_x_bias(ctx, x_bias)
    save(ctx, (hidden, weight, bias, mean, rstd), task_arguments)
    ctx.mark_non_differentiable(*(() if ctx.prenorm else (hidden,)), mean, rstd)
    ctx.set_materialize_grads(not ctx.prenorm)


@differentiable_once("dropout_add_layer_norm", _INSTEAD)
def _add_backward(
    ctx: Any,
    saved: tuple[Tensor, ...],
    grad_out: Tensor | None,
    grad_hidden: Tensor | None,
    *_: Any,
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, mean, rstd = saved
    if grad_out is None:  # of a pre-norm whose sum alone is used
        grad_out = torch.zeros_like(hidden)
    task_arguments = parameter_rows(ctx, weight, bias, mean)
    gradient_rows, segments = task_arguments[:2], task_arguments[2:]
    own_rows = x_bias_rows(ctx, mean)
    # h itself leaves a pre-norm alone; elsewhere torch may hand zeros for it.
    grad_sum = grad_hidden if ctx.prenorm else None
    arguments = (grad_out, hidden, weight, mean, rstd, *gradient_rows, own_rows, *segments)
    if ctx.dropout_p > 0:
        grad_residual, grad_x = _ops.dropout_add_layer_norm_backward(
            *arguments, ctx.dropout_p, ctx.seed, ctx.rng_offset, grad_sum, ctx.is_rms_norm
        )
    else:
        grad_residual = grad_x = _ops.layer_norm_backward(*arguments, grad_sum, ctx.is_rms_norm)
    gradients = x_bias_gradient(ctx, own_rows), *parameter_gradients(ctx, *gradient_rows)
    return grad_x, grad_residual, *gradients, *[None] * 10


_FAKES: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm_fake,
    "layer_norm_backward": _layer_norm_backward_fake,
    "dropout_add_layer_norm": _add_fake,
    "dropout_add_layer_norm_backward": _add_backward_fake,
}
for _name, _fake in _FAKES.items():
    register_fake(_name)(_fake)
    declare(_name, cpu="cpp", cuda="triton")


@register_cuda("layer_norm")
def _layer_norm_cuda(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from . import layer_norm_triton

    check_norm(x, weight, bias, eps)
    out, _hidden, mean, rstd = layer_norm_triton.forward(x, weight, bias, eps, is_rms_norm=rest[-1])
    return out, mean, rstd


@register_cuda("layer_norm_backward")
def _layer_norm_backward_cuda(*given: Any) -> Tensor:
    from . import layer_norm_triton

    *arguments, grad_sum, is_rms_norm = given
    check_norm_backward(*arguments[:9], grad_sum=grad_sum)
    return layer_norm_triton.backward(*arguments, grad_sum=grad_sum, is_rms_norm=is_rms_norm)[0]


@register_cuda("dropout_add_layer_norm")
def _add_cuda(
    x: Tensor,
    residual: Tensor,
    x_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float,
    eps: float,
    seed: Tensor | None,
    rng_offset: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from . import layer_norm_triton

    given = (x, weight, bias, eps, residual, x_bias, dropout_p, seed, rng_offset)
    check_norm(*given)
    *_task_arguments, prenorm, is_rms_norm = rest
    return layer_norm_triton.forward(*given, prenorm=prenorm, is_rms_norm=is_rms_norm)


@register_cuda("dropout_add_layer_norm_backward")
def _add_backward_cuda(*given: Any) -> tuple[Tensor, Tensor]:
    from . import layer_norm_triton

    *arguments, grad_sum, is_rms_norm = given
    check_norm_backward(*arguments[:9], *arguments[10:], grad_sum=grad_sum)
    return layer_norm_triton.backward(*arguments, grad_sum=grad_sum, is_rms_norm=is_rms_norm)


for _name, _backward, _setup in (
    ("layer_norm", _layer_norm_backward, _layer_norm_setup),
    ("dropout_add_layer_norm", _add_backward, _add_setup),
):
    register_derivative(_name, _backward, _setup, name=_name, instead=_INSTEAD)
    refuse_vmap(f"{_name}_backward", name=_name, instead=_INSTEAD)


# ---- public -------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    *,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor:
    """Normalise the last dimension: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Args:
        x: ``[..., N]``, any floating dtype; ``[T, N]`` with rows.
        weight: ``[N]``, any floating dtype; None stands for ones.
        bias: ``[N]``, likewise; None stands for zeros.
        eps: added to the variance, finite and not negative; BERT's default.
        rows: where task gradients of weight and bias go; their ``grad`` then stays None.
        segments: which rows of ``x`` belong to which task; needed with ``rows``.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names it.
    """
    return _norm(x, weight, bias, eps, rows, segments, is_rms_norm=False)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor:
    """Divide the last dimension by its root mean square: ``x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: ``[..., N]``, any floating dtype; ``[T, N]`` with rows.
        weight: ``[N]``, any floating dtype; None stands for ones.
        eps: added to the mean square, finite and not negative.
        rows: where task gradients of the weight go; its ``grad`` then stays None.
        segments: which rows of ``x`` belong to which task; needed with ``rows``.

    Returns:
        ``[..., N]`` in x's dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit; the message names it.
    """
    return _norm(x, weight, None, eps, rows, segments, is_rms_norm=True)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: TaskRows | None,
    segments: TaskSegments | None,
    *,
    is_rms_norm: bool,
) -> Tensor:
    tasks = task_arguments(x, weight, bias, rows, segments)
    if x.dtype == torch.float64:
        check_data(x=x, weight=weight, bias=bias)
        check_number("eps", eps)
        return layer_norm_reference(x, weight, bias, eps, rows, segments, is_rms_norm)
    out: Tensor = _ops.layer_norm(x, weight, bias, eps, *tasks, is_rms_norm)[0]
    return out


def refuse_given(**unsupported: object) -> None:
    """Raise NotImplementedError if an argument of flash-attn is given that has no effect here."""
    for name, value in unsupported.items():
        if value is not None and value is not False:
            raise NotImplementedError(f"{name}: not supported by this layer norm")


def dropout_add_layer_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float = 0.0,
    epsilon: float = 1e-12,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    is_rms_norm: bool = False,
    x_bias: Tensor | None = None,
    training: bool = True,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    stream: int | None = None,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dropout, residual and norm in one pass: ``layer_norm(residual + dropout(x0 + x_bias))``.

    The arguments that have a place are those of flash-attn's function of that name.

    Args:
        x0: ``[..., N]``, any floating dtype; ``[T, N]`` with rows.
        residual: shape of ``x0``; where the dtypes differ, both are taken to the wider one.  None:
            nothing is added.
        weight: ``[N]``, any floating dtype; None stands for ones.
        bias: ``[N]``, likewise; None stands for zeros.
        dropout_p: probability to drop an element of ``x0``.
        epsilon: added to the variance; BERT's default.
        rowscale: not supported, nor are layerscale and return_dropout_mask.
        layerscale: see rowscale.
        prenorm: return the sum before the norm too, as the residual of the next layer, with a
            gradient of its own.  The norm is then that of the sum in its own dtype.  Without a
            residual the sum is computed apart and not in the pass of the norm.
        residual_in_fp32: keep the sum in float32 where there is no residual, whose dtype it has
            otherwise.
        return_dropout_mask: see rowscale.
        is_rms_norm: divide by the root mean square, without taking the mean off first.
        x_bias: ``[N]``, any floating dtype, added to ``x0`` before the dropout: the bias of the
            linear layer that ``x0`` comes from, say.
        training: without it there is no dropout.
        seed: of dropout; int64, one element, on x0's device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.
        stream: the old name of ``rng_offset``, deprecated.
        rows: where task gradients of weight, bias and x_bias go; their ``grad`` then stays None.
        segments: which rows of ``x0`` belong to which task; needed with ``rows``.

    Returns:
        ``[..., N]`` in the wider dtype of x0 and residual; with ``prenorm`` also
        ``residual + dropout(x0 + x_bias)``, likewise.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; the message names it.
        NotImplementedError: an argument of flash-attn that this function does not support.
    """
    if stream is not None:
        rng_offset = renamed_argument("stream", stream, "rng_offset", rng_offset, 0)
    refuse_given(rowscale=rowscale, layerscale=layerscale, return_dropout_mask=return_dropout_mask)
    buffer, columns, *own_segments = task_arguments(
        x0, weight, bias, rows, segments, x_bias, name="x0"
    )
    check_dropout(dropout_p, seed, rng_offset, x0.device)
    p = dropout_p if training else 0.0
    if residual is not None:
        if residual.shape != x0.shape or residual.device != x0.device:
            raise ValueError(
                f"residual: expected {list(x0.shape)} on {x0.device}, "
                f"got {list(residual.shape)} on {residual.device}"
            )
        if residual.dtype != x0.dtype:
            check_data(x0=x0, residual=residual)
            dtype = torch.promote_types(x0.dtype, residual.dtype)
            x0, residual = x0.to(dtype), residual.to(dtype)
    if residual is None or x0.dtype == torch.float64:
        check_data(x0=x0, residual=residual, x_bias=x_bias)
        biased = _with_x_bias(x0, x_bias, rows, segments)
        hidden = dropout(biased, p, seed=seed, rng_offset=rng_offset)
        if residual is not None:
            hidden = residual + hidden
        in_float32 = residual_in_fp32 and residual is None and x0.dtype != torch.float64
        hidden = hidden.to(torch.float32 if in_float32 else x0.dtype)
        norm_rows = None if rows is None else rows._replace(x_bias_columns=None)
        norm = (weight, bias, epsilon, norm_rows, segments)
        normalised = _norm(hidden, *norm, is_rms_norm=is_rms_norm).to(x0.dtype)
        return (normalised, hidden) if prenorm else normalised
    if p > 0 and seed is None:
        seed = new_seed(x0.device)
    if rows is not None:
        columns = (*columns, first_column(rows.x_bias_columns))
    tasks = (buffer, columns, *own_segments)
    out, hidden, *_ = _ops.dropout_add_layer_norm(
        *(x0, residual, x_bias, weight, bias, p, epsilon, seed, rng_offset, *tasks),
        *(prenorm, is_rms_norm),
    )
    return (out, hidden) if prenorm else out


def dropout_add_rms_norm(
    x0: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dropout_p: float = 0.0,
    epsilon: float = 1e-6,
    rowscale: Tensor | None = None,
    layerscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
    *,
    x_bias: Tensor | None = None,
    training: bool = True,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Dropout, residual and RMS norm in one pass: ``rms_norm(residual + dropout(x0 + x_bias))``.

    It is :func:`dropout_add_layer_norm` with ``is_rms_norm``; the arguments that have a place are
    those of flash-attn's function of that name.

    Args:
        x0: ``[..., N]``, any floating dtype; ``[T, N]`` with rows.
        residual: shape of ``x0``; None: nothing is added.
        weight: ``[N]``, any floating dtype; None stands for ones.
        bias: ``[N]``, likewise; None stands for zeros.
        dropout_p: probability to drop an element of ``x0``.
        epsilon: added to the mean square.
        rowscale: not supported, nor are layerscale and return_dropout_mask.
        layerscale: see rowscale.
        prenorm: return the sum before the norm too, with a gradient of its own.
        residual_in_fp32: keep the sum in float32 where there is no residual.
        return_dropout_mask: see rowscale.
        x_bias: ``[N]``, any floating dtype, added to ``x0`` before the dropout.
        training: without it there is no dropout.
        seed: of dropout; int64, one element, on x0's device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.
        rows: where task gradients of weight, bias and x_bias go; their ``grad`` then stays None.
        segments: which rows of ``x0`` belong to which task; needed with ``rows``.

    Returns:
        ``[..., N]`` in the wider dtype of x0 and residual; with ``prenorm`` also
        ``residual + dropout(x0 + x_bias)``, likewise.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit; the message names it.
        NotImplementedError: an argument of flash-attn that this function does not support.
    """
    return dropout_add_layer_norm(
        *(x0, residual, weight, bias, dropout_p, epsilon, rowscale, layerscale),
        *(prenorm, residual_in_fp32, return_dropout_mask),
        is_rms_norm=True,
        x_bias=x_bias,
        training=training,
        seed=seed,
        rng_offset=rng_offset,
        rows=rows,
        segments=segments,
    )
