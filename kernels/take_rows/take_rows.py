"""Take rows of a matrix, each once at most.

    y_j = x[i_j], or 0 where x has no row i_j                  x [T, H], i [m], y [m, H]
    dx[i_j] = dy_j, 0 elsewhere

torch's indexing does not know that no row is taken twice: its gradient on a GPU sorts the index and
adds, or adds atomically, in an order that differs from call to call.  Here it is written, once.
"""

from typing import Any

import torch
from torch import Tensor

from ..registration.backend import declare, register_cuda, register_fake
from ..registration.differentiation import differentiable_once, register_derivative
from ..registration.validation import check_data, check_input, check_kernel_dtype, check_tensor

# ---- reference ----------------------------------------------------------------------------------


def take_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """``y`` by plain torch operations, in the dtype of x."""
    if len(x) == 0:
        return x.new_zeros(len(index), x.shape[1]) + x.sum()
    is_row = (index >= 0) & (index < len(x))
    return torch.where(is_row[:, None], x[index.clamp(0, len(x) - 1)], 0)


# ---- registration -------------------------------------------------------------------------------

torch.library.define("superbert::take_rows", "(Tensor x, Tensor index) -> Tensor")
torch.library.define(
    "superbert::take_rows_backward", "(Tensor grad, Tensor index, SymInt num_rows) -> Tensor"
)


def _check(x: Tensor, index: Tensor) -> None:
    check_kernel_dtype("x", x)
    if x.dim() != 2:
        raise ValueError(f"x: expected [T, H], got {list(x.shape)}")
    check_data(x=x)
    _check_index(index, x)


def _check_backward(grad: Tensor, index: Tensor, num_rows: int) -> None:
    check_kernel_dtype("grad", grad)
    if grad.dim() != 2 or len(grad) != index.numel():
        raise ValueError(f"grad: expected [{index.numel()}, H], got {list(grad.shape)}")
    check_data(grad=grad)
    _check_index(index, grad)
    if not 0 <= num_rows < 2**31:
        raise ValueError(f"num_rows: expected a number of rows below 2**31, got {num_rows}")


def _check_index(index: Tensor, x: Tensor) -> None:
    if index.dim() != 1:
        raise ValueError(f"index: expected [m], got {list(index.shape)}")
    check_tensor("index", index, (len(index),), torch.int64, x.device)


@torch.library.impl("superbert::take_rows", "CPU")
def _cpu(x: Tensor, index: Tensor) -> Tensor:
    _check(x, index)
    return take_rows_reference(x, index).contiguous()


@torch.library.impl("superbert::take_rows_backward", "CPU")
def _backward_cpu(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    _check_backward(grad, index, num_rows)
    is_row = (index >= 0) & (index < num_rows)
    rows = index[is_row]
    ascending = rows.sort().values
    if (ascending[1:] == ascending[:-1]).any():
        raise ValueError("index: expected each 0 <= index < num_rows once at most")
    out = grad.new_zeros(num_rows, grad.shape[1])
    out[rows] = grad[is_row]
    return out


@register_cuda("take_rows")
def _cuda(x: Tensor, index: Tensor) -> Tensor:
    from . import take_rows_triton

    _check(x, index)
    return take_rows_triton.forward(x, index)


@register_cuda("take_rows_backward")
def _backward_cuda(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    from . import take_rows_triton

    _check_backward(grad, index, num_rows)
    return take_rows_triton.backward(grad, index, num_rows)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, index = inputs
    ctx.num_rows = x.shape[0]
    ctx.save_for_backward(index)


_INSTEAD = "x[index]"


@differentiable_once("take_rows", _INSTEAD)
def _backward(ctx: Any, saved: tuple[Tensor], grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.superbert.take_rows_backward(grad, *saved, ctx.num_rows), None


register_fake("take_rows")(lambda x, index: x.new_empty((index.shape[0], x.shape[1])))
register_fake("take_rows_backward")(
    lambda grad, _index, num_rows: grad.new_empty((num_rows, grad.shape[1]))
)
for _name in ("take_rows", "take_rows_backward"):
    declare(_name, cpu="torch", cuda="triton")
register_derivative("take_rows", _backward, _setup_context, name="take_rows", instead=_INSTEAD)


# ---- public -------------------------------------------------------------------------------------


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return ``x[index]`` for an index that has no row twice; zeros where it leads beyond x.

    Its gradient has the same bits each time, also on a GPU.

    Args:
        x: ``[T, H]``; float32, bfloat16, float16 (or float64, by the reference).
        index: int64 ``[m]``.  Any number outside of ``0 <= i < T``, such as -1, stands for a row of
            zeros that nothing is learnt from.  A row that is there twice would get the gradient
            of one of both: on a CPU the backward pass refuses it, on a GPU nobody looks.

    Returns:
        ``[m, H]`` in the dtype of x, contiguous.

    Raises:
        TypeError: x is no tensor.
        ValueError: x is sparse, no matrix or of another dtype, the index is no int64 ``[m]`` on its
            device, or a storage was freed.
    """
    check_input("x", x)
    if x.dtype == torch.float64:
        if x.dim() != 2:
            raise ValueError(f"x: expected [T, H], got {list(x.shape)}")
        _check_index(index, x)
        return take_rows_reference(x, index).contiguous()
    out: Tensor = torch.ops.superbert.take_rows(x, index)
    return out
