"""A linear layer whose backward writes one weight gradient for each task.

    y = x W^T + b        x [T, I], W [O, I], b [O], y [T, O]
    dx = dy W
    dW_k = dy_k^T x_k,  db_k = sum of dy_k over its rows       (k: the rows of task k)

The K weight products together do the arithmetic of the single ``dy^T x``; each is written to its
row of the flat gradient buffer, so nothing is copied, summed or zero-filled afterwards.

On a GPU one Triton kernel computes all of them, and the bias gradients, where x is in 16 bits.  In
float32 the products are torch's, and the kernel sums for the biases; float64 is torch's.

On a CPU with AVX512-BF16 this project's own kernels (csrc/linear_cpu.cpp) compute all products of
bfloat16, and the bias gradients on the way.  Both operands are packed block by block, and nothing
is compiled for a number of rows, as oneDNN does.  They multiply in the tiles of AMX where there are
any.  On other CPUs, and for other dtypes, products are torch's but one: for a bfloat16 product
torch first writes the bias into the result, and oneDNN adds it as it stores the result, at no cost.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function

from .. import _extension  # noqa: F401  (registers the operators)
from ..gradient_queue import enqueue
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.differentiation import differentiable_once, in_forward_mode, refuse_transforms
from ..registration.function_modes import active_layer_modes
from ..registration.validation import (
    DTYPES,
    check_data,
    check_offsets,
    check_rows_apart,
    check_tensor,
)
from ..task_rows import TaskRows, TaskSegments, rows_of

_ops = torch.ops.superbert

MULTIPLIES_BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
"""Whether this project's bfloat16 products run on this processor."""
HAS_ONEDNN = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
"""Whether oneDNN has bfloat16 products for this processor."""


@torch.library.custom_op("superbert::onednn_linear", mutates_args=(), device_types="cpu")
def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ``x W^T + b``, the bias added by oneDNN; arguments as of :func:`linear`.

    An operator, since torch.compile takes the one inside of it apart.
    """
    if x.dim() == 0 or weight.dim() != 2:
        raise ValueError(
            f"weight: expected x [..., I] and weight [O, I], got {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    width = x.shape[-1]
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"x: expected bfloat16 or float32, got {x.dtype}")
    if x.dtype == torch.bfloat16 and not HAS_ONEDNN:
        raise ValueError("x: oneDNN has no bfloat16 product for this processor; use float32")
    check_tensor("x", x, x.shape, x.dtype, x.device)
    check_tensor("weight", weight, (len(weight), width), x.dtype, x.device)
    check_tensor("bias", bias, weight.shape[:1], x.dtype, x.device)
    bias = bias.contiguous()  # oneDNN takes it to be
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _onednn_fake(x: Tensor, weight: Tensor, _bias: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def is_ours(*tensors: Tensor | None) -> bool:
    """Return whether this project's kernels multiply tensors like these on a CPU."""
    if not MULTIPLIES_BF16:
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    return all(x is None or (x.is_cpu and x.dtype == torch.bfloat16) for x in tensors)


def _apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + b``, dtype of all three the same, without a graph for autograd."""
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype:
        return F.linear(x, weight, bias)  # which alone is cast
    if x.dim() == 2 and is_ours(x, weight, bias):
        product: Tensor = _ops.linear_bf16(x, weight, bias)
        return product
    if bias is not None and HAS_ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.bfloat16:
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def linear_task_gradients_reference_(
    grad_output: Tensor,
    x: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
) -> None:
    """As :func:`linear_task_gradients_`, by plain torch operations, task by task."""
    for task, (start, end) in enumerate(pairwise(offsets)):
        dy, inputs = grad_output[start:end], x[start:end]
        if weight_rows.numel() > 0:
            row = weight_rows[task]
            if row.dtype != dy.dtype:  # as autograd: a gradient of autocast's dtype, then widened
                product = dy.t().mm(inputs)
                row.add_(product) if accumulate else row.copy_(product)
            elif accumulate:
                row.addmm_(dy.t(), inputs)
            else:
                torch.mm(dy.t(), inputs, out=row)
        if bias_rows.numel() > 0:
            if accumulate:
                bias_rows[task].add_(dy.sum(0))
            else:
                torch.sum(dy, 0, out=bias_rows[task])


@torch.library.custom_op(
    "superbert::linear_task_gradients_",
    mutates_args=("weight_rows", "bias_rows"),
    device_types="cpu",
)
def linear_task_gradients_(
    grad_output: Tensor,
    x: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
) -> None:
    """Write ``dy_k^T x_k`` and the column sums of ``dy_k`` into row k, for every task k.

    On a GPU Triton kernels do, but for float64 and the products of float32, which are torch's.

    Args:
        grad_output: dy ``[T, O]``.
        x: ``[T, I]``.
        weight_rows: ``[K, O, I]``, written; any row stride, of another dtype under autocast.
            Without elements where not wanted.
        bias_rows: ``[K, O]``, likewise.
        offsets: K + 1 ascending row numbers.
        accumulate: add to what the rows hold.
    """
    tensors = (grad_output, x, weight_rows, bias_rows)
    _check_gradients(*tensors, offsets)
    ours = _are_ours(*tensors)
    write = _ops.linear_bf16_task_gradients_ if ours else linear_task_gradients_reference_
    enqueue(write, (*tensors, offsets, accumulate))


def _are_ours(grad_output: Tensor, x: Tensor, *rows: Tensor) -> bool:
    """Return whether this project's kernels write the gradients of these."""
    written = {own.dtype for own in rows if own.numel() > 0}
    return is_ours(grad_output, x) and written <= {torch.bfloat16, torch.float32}


def write_task_gradients(
    grad_output: Tensor,
    x: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
) -> None:
    """As :func:`linear_task_gradients_`, without its checks where this project's kernels check."""
    tensors = (grad_output, x, weight_rows, bias_rows)
    if _are_ours(*tensors) and not torch.compiler.is_compiling():
        enqueue(_ops.linear_bf16_task_gradients_, (*tensors, offsets, accumulate))
    else:
        linear_task_gradients_(*tensors, offsets, accumulate)


@register_cuda("linear_task_gradients_", only_rows=True)
def _task_gradients_cuda(
    grad_output: Tensor,
    x: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
    accumulate: bool,
) -> None:
    from . import linear_triton

    _check_gradients(grad_output, x, weight_rows, bias_rows, offsets)
    if grad_output.dtype != x.dtype:  # under autocast
        dtype = torch.get_autocast_dtype(x.device.type)
        grad_output, x = grad_output.to(dtype), x.to(dtype)
    streams, segments = (grad_output, x), (offsets, accumulate)
    written = [rows.dtype for rows in (weight_rows, bias_rows) if rows.numel() > 0]
    if torch.float64 in (x.dtype, *written):
        linear_task_gradients_reference_(*streams, weight_rows, bias_rows, *segments)
    elif x.dtype == torch.float32:
        no_bias = bias_rows.new_empty(0)
        linear_task_gradients_reference_(*streams, weight_rows, no_bias, *segments)
        linear_triton.write_bias_gradients_(grad_output, bias_rows, *segments)
    else:
        linear_triton.write_gradients_(*streams, weight_rows, bias_rows, *segments)


def _task_gradients_fake(*_arguments: object) -> None:
    pass


def _bf16_fake(x: Tensor, weight: Tensor, _bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], len(weight))  # len(x) would compile for this number of rows


def _bf16_grad_input_fake(grad_output: Tensor, weight: Tensor) -> Tensor:
    return grad_output.new_empty(grad_output.shape[0], weight.shape[1])


register_fake("linear_bf16")(_bf16_fake)
register_fake("linear_bf16_grad_input")(_bf16_grad_input_fake)
register_fake("linear_bf16_task_gradients_")(_task_gradients_fake)
for _name in ("linear_bf16", "linear_bf16_grad_input", "linear_bf16_task_gradients_"):
    declare(_name, cpu="cpp", cuda=None)
register_fake("onednn_linear")(_onednn_fake)
register_fake("linear_task_gradients_")(_task_gradients_fake)
declare("onednn_linear", cpu="torch", cuda=None)
declare("linear_task_gradients_", cpu="cpp" if MULTIPLIES_BF16 else "torch", cuda="triton")


def _check_gradients(
    grad_output: Tensor,
    x: Tensor,
    weight_rows: Tensor,
    bias_rows: Tensor,
    offsets: Sequence[int],
) -> None:
    """Check what a backward pass is given: torch's own ``out=`` would resize what does not fit."""
    for name, stream in (("x", x), ("grad_output", grad_output)):
        if stream.dim() != 2:
            raise ValueError(f"{name}: expected [tokens, width], got {list(stream.shape)}")
        # Autocast makes one dtype of two.
        dtype = (stream if torch.is_autocast_enabled(x.device.type) else grad_output).dtype
        check_tensor(name, stream, (len(x), stream.shape[1]), dtype, x.device)
        if dtype not in DTYPES:
            raise ValueError(f"{name}: expected a floating dtype, got {dtype}")
    check_offsets("offsets", offsets, len(x))
    shapes = (grad_output.shape[1], x.shape[1]), (grad_output.shape[1],)
    for name, rows, shape in zip(
        ("weight_rows", "bias_rows"), (weight_rows, bias_rows), shapes, strict=True
    ):
        if rows.numel() > 0:
            check_tensor(name, rows, (len(offsets) - 1, *shape), rows.dtype, x.device)
            if rows.dtype not in DTYPES:
                raise ValueError(f"{name}: expected a floating dtype, got {rows.dtype}")
            check_rows_apart(name, rows, x=x, grad_output=grad_output)
    if weight_rows.numel() > 0:
        check_rows_apart("weight_rows", weight_rows, bias_rows=bias_rows)


def grad_input_of(grad_output: Tensor, weight: Tensor) -> Tensor:
    """Return ``dy W``, dy ``[T, O]``, W ``[O, I]``."""
    if is_ours(grad_output, weight):
        product: Tensor = _ops.linear_bf16_grad_input(grad_output, weight)
        return product
    return grad_output.mm(weight)


class _TaskLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        buffer: Tensor,
        starts: tuple[int, int],
        offsets: tuple[int, ...],
        accumulate: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        # Not a saved tensor: each backward overwrites it, which is its purpose.
        ctx.rows = (buffer, starts)
        ctx.segments = (offsets, accumulate)
        return _apply(x, weight, bias)

    @staticmethod
    @differentiable_once("linear with task rows", "the layer without rows")
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], grad_output: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias = saved
        # A hook on saved tensors may have changed what tells the shapes of the rows.
        shape = (grad_output.shape[1], x.shape[-1])
        check_tensor("weight", weight, shape, weight.dtype, x.device)
        if bias is not None:
            check_tensor("bias", bias, shape[:1], bias.dtype, x.device)
        buffer, starts = ctx.rows
        weight_rows, bias_rows = map(rows_of, (buffer, buffer), starts, (weight, bias))
        write_task_gradients(grad_output, x, weight_rows, bias_rows, *ctx.segments)
        grad_input = grad_input_of(grad_output, weight) if ctx.needs_input_grad[0] else None
        return grad_input, None, None, None, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: TaskRows | None = None,
    segments: TaskSegments | None = None,
) -> Tensor:
    """Apply ``x W^T + b``; with ``rows``, the backward pass writes the K weight gradients there.

    Args:
        x: ``[T, I]`` with rows, ``[..., I]`` without, any floating dtype.
        weight: ``[O, I]``, dtype of ``x``.
        bias: ``[O]``, likewise, or None.
        rows: where task gradients go, of the weight's dtype; ``weight.grad`` then stays None.
        segments: which rows of ``x`` belong to which task; needed with ``rows``.

    Returns:
        ``[..., O]`` in the dtype of ``x``, or autocast's.

    Raises:
        ValueError: ``rows`` without ``segments``, shapes of the two that disagree, or a storage
            that was freed.
    """
    check_data(x=x, weight=weight, bias=bias)
    if rows is None:
        is_differentiated = torch.is_grad_enabled() or in_forward_mode()
        return (F.linear if is_differentiated else _apply)(x, weight, bias)
    if x.dim() != 2 or weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(
            "rows: task gradients need x [T, I], weight [O, I] and bias [O], got "
            + ", ".join(str(list(t.shape)) for t in (x, weight, bias) if t is not None)
        )
    refuse_transforms("linear", x, weight, bias)
    segments = rows.checked(segments, weight, bias, x)
    return _TaskLinear.apply(x, weight, bias, rows.buffer, rows.starts, *segments)  # type: ignore[no-untyped-call]


def joint_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Apply several linear layers to one input, in one product where there are many rows.

    Weights have to be copied side by side for one product.  Where rows are less than a quarter of
    the columns, that takes longer than several products, whose outputs are copied instead.  A torch
    function mode sees this call itself, with the parameters as they are.

    Args:
        x: ``[..., I]``, any floating dtype.
        weights: of each layer, ``[O, I]``, dtype of ``x``.
        biases: of each layer, ``[O]``, or None; of all layers or of none.

    Returns:
        ``[..., sum of O]``, side by side, in the dtype of ``x`` or autocast's.

    Raises:
        ValueError: biases of some layers alone, or a storage that was freed where one product is
            taken.
    """
    tensors = (x, *weights, *biases)
    if has_torch_function(tensors):
        out: Tensor = handle_torch_function(joint_linear, tensors, x, weights, biases)
        return out
    given = [bias for bias in biases if bias is not None]
    if len(given) not in (0, len(weights)) or len(biases) != len(weights):
        raise ValueError(f"biases: expected {len(weights)} or none, got {len(given)}")
    if torch.compiler.is_compiling():  # whose graph serves any number of rows
        # Modes see torch's calls alone while it traces.
        is_joined = len(active_layer_modes()) == 0
    else:
        is_joined = 4 * x.numel() >= x.shape[-1] ** 2
    if not is_joined:
        return torch.cat([F.linear(x, *layer) for layer in zip(weights, biases, strict=True)], -1)
    return linear(x, torch.cat(list(weights)), torch.cat(given) if given else None)
