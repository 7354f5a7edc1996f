"""The feed-forward part of a transformer layer, with GELU inside its products where they are ours.

    y = gelu(x U^T + u) D^T,   gelu(a) = a Phi(a)

    da = (dy D) gelu'(a),   dx = da U

On a CPU where this project multiplies bfloat16 (`kernels.linear.linear`), the first product writes
``a`` and ``gelu(a)`` as its sums leave the registers, and the product ``dy D`` is multiplied by
``gelu'(a)`` before it is rounded, so that neither is a pass over memory of its own.  Both are
accurate to 2^-12 there, of numbers of 8 bits; results below 2^-126 are zero.  GELU of plus infinity
is infinity and of minus infinity zero, its limits, where torch's may be NaN.  Everywhere else these
are two linear layers and torch's GELU.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..registration.backend import declare, register_fake
from ..registration.differentiation import differentiable_once, in_forward_mode, refuse_transforms
from ..registration.validation import check_data, check_tensor
from ..task_rows import TaskRows, TaskSegments, rows_of
from .linear import grad_input_of, is_ours, linear, write_task_gradients

_ops = torch.ops.superbert


@register_fake("linear_bf16_gelu")
def _gelu_fake(x: Tensor, weight: Tensor, _bias: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = x.shape[0], len(weight)
    return x.new_empty(shape), x.new_empty(shape)


@register_fake("linear_bf16_gelu_grad_input")
def _gelu_grad_input_fake(grad_output: Tensor, weight: Tensor, _x: Tensor) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


declare("linear_bf16_gelu", cpu="cpp", cuda=None)
declare("linear_bf16_gelu_grad_input", cpu="cpp", cuda=None)


class _TaskFeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        up_weight: Tensor,
        up_bias: Tensor | None,
        down_weight: Tensor,
        up_buffer: Tensor,
        up_starts: tuple[int, int],
        down_buffer: Tensor | None,
        down_starts: tuple[int, int],
        offsets: tuple[int, ...],
        accumulate: bool,
    ) -> Tensor:
        widened, activated = _ops.linear_bf16_gelu(x, up_weight, up_bias)
        ctx.save_for_backward(x, up_weight, up_bias, down_weight, widened, activated)
        # Not saved tensors: each backward overwrites them, which is their purpose.
        down_buffer = up_buffer if down_buffer is None else down_buffer
        ctx.rows = up_buffer, up_starts, down_buffer, down_starts
        ctx.segments = offsets, accumulate
        product: Tensor = _ops.linear_bf16(activated, down_weight, None)
        return product

    @staticmethod
    @differentiable_once("feed_forward with task rows", "it without rows")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, up_weight, up_bias, down_weight, widened, activated = saved
        # A hook on saved tensors may have changed what tells the shapes of the rows.
        inner = activated.shape[-1]
        check_tensor("up_weight", up_weight, (inner, x.shape[-1]), x.dtype, x.device)
        shape = (grad_output.shape[1], inner)
        check_tensor("down_weight", down_weight, shape, x.dtype, x.device)
        if up_bias is not None:
            check_tensor("up_bias", up_bias, (inner,), x.dtype, x.device)
        up_buffer, up_starts, down_buffer, down_starts = ctx.rows
        down = (rows_of(down_buffer, down_starts[0], down_weight), down_buffer.new_empty(0))
        write_task_gradients(grad_output, activated, *down, *ctx.segments)
        grad = _ops.linear_bf16_gelu_grad_input(grad_output, down_weight, widened)
        up, of_bias = map(rows_of, (up_buffer, up_buffer), up_starts, (up_weight, up_bias))
        write_task_gradients(grad, x, up, of_bias, *ctx.segments)
        grad_input = grad_input_of(grad, up_weight) if ctx.needs_input_grad[0] else None
        return grad_input, *(None,) * 9


def feed_forward(
    x: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    *,
    up_rows: TaskRows | None = None,
    down_rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor:
    """Apply ``gelu(x U^T + u) D^T``; with rows, the backward pass writes weight gradients there.

    On a CPU with AVX512-BF16, products of a bfloat16 ``[T, H]`` compute gelu and its derivative on
    the way: with the rows of both layers, and under no_grad.  Of minus infinity gelu is then zero
    and of infinity infinity; torch's, which is taken everywhere else, may be NaN.

    Args:
        x: ``[T, H]`` with rows, ``[..., H]`` without, any floating dtype.
        up_weight: U ``[I, H]``, dtype of ``x``.
        up_bias: u ``[I]``, likewise, or None.
        down_weight: D ``[O, I]``, likewise.
        up_rows: where the task gradients of U and u go, as in `kernels.linear`.
        down_rows: where those of D go, likewise.
        segments: which rows of ``x`` belong to which task; needed with rows.

    Returns:
        ``[..., O]`` in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: rows without ``segments``, shapes of the two that disagree, or a storage that
            was freed.
    """
    check_data(x=x, up_weight=up_weight, up_bias=up_bias, down_weight=down_weight)
    weights = (up_weight, down_weight)
    ours = x.dim() == 2 and is_ours(x, up_bias, *weights) and not torch.is_autocast_enabled("cpu")
    if ours and up_rows is not None and down_rows is not None:
        refuse_transforms("feed_forward", x, up_weight, up_bias, down_weight)
        own = up_rows.checked(segments, up_weight, up_bias, x)
        down_rows.checked(segments, down_weight, None, x)
        # torch.compile takes no tensor twice, and the buffer is one, as a rule.
        down_buffer = None if down_rows.buffer is up_rows.buffer else down_rows.buffer
        return _TaskFeedForward.apply(  # type: ignore[no-untyped-call]
            *(x, up_weight, up_bias, down_weight),
            *(up_rows.buffer, up_rows.starts, down_buffer, down_rows.starts),
            *own,
        )
    is_differentiated = torch.is_grad_enabled() or in_forward_mode()
    if ours and up_rows is None and down_rows is None and not is_differentiated:
        return linear(_ops.linear_bf16_gelu(x, up_weight, up_bias)[1], down_weight)
    widened = linear(x, up_weight, up_bias, rows=up_rows, segments=segments)
    return linear(F.gelu(widened), down_weight, rows=down_rows, segments=segments)
