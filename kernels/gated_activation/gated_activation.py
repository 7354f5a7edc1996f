"""Gated activations of a feed-forward network (Shazeer, "GLU Variants Improve Transformer", 2020).

    a, b = x[..., :I], x[..., I:]                                  x [..., 2 I], y [..., I]
    y = f act(a) b                                                 f: dropout's factors, or 1

    act(a) = a Phi(a),    Phi(a) = (1 + erf(a / sqrt(2))) / 2                       gelu
           = a sigmoid(2 sqrt(2 / pi) (a + 0.044715 a^3))                           gelu_tanh
           = a sigmoid(a)                                                           silu

    dx = [f dy b act'(a), f dy act(a)]

x is the output of one linear layer, whose first half is activated: ``Wo(y)`` with
``x = Wi(hidden)`` is a feed-forward network such as ModernBERT's.  The backward pass reads x alone
and computes the activation again, with its derivative, so that nothing but x is kept.

All is computed in float32 whatever the dtype.  In the lower tail, where act(a) is tiny but not
zero, the probability is computed as one, and not as 1 less a number near 1, so that it is right to
a few units in the last place there too.  With dropout, y is rounded to x's dtype before, so that
the result is that of `kernels.dropout` behind this operator, to the bit, and so is the gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import _extension  # noqa: F401  (registers the operators)
from ..dropout.dropout import check_dropout, check_seed, dropout, new_seed
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.differentiation import differentiable_once, refuse_vmap, register_derivative
from ..registration.validation import check_data, check_input, check_kernel_dtype, check_tensor

_ops = torch.ops.superbert

GELU, GELU_TANH, SILU = range(3)
"""Activations, as the Triton kernels number them."""


# ---- reference ----------------------------------------------------------------------------------


def gated_activation_reference(x: Tensor, activation: int) -> Tensor:
    """``act(a) b`` by plain torch operations, in the dtype of x."""
    a, b = x.chunk(2, -1)
    if activation == SILU:
        return functional.silu(a) * b
    return functional.gelu(a, approximate="tanh" if activation == GELU_TANH else "none") * b


# ---- registration -------------------------------------------------------------------------------


def _width(x: Tensor) -> int:
    """Half of the last dimension."""
    if x.dim() == 0 or x.shape[-1] % 2 != 0:
        raise ValueError(f"x: expected [..., 2 I], got {list(x.shape)}")
    return x.shape[-1] // 2


def _check(x: Tensor, dropout_p: float, seed: Tensor | None, rng_offset: int) -> None:
    check_kernel_dtype("x", x)
    _width(x)
    check_data(x=x)
    check_seed(dropout_p, seed, rng_offset, x.device)


def _check_backward(grad_out: Tensor, x: Tensor, *dropout_arguments: Any) -> None:
    _check(x, *dropout_arguments)
    check_tensor("grad_out", grad_out, (*x.shape[:-1], _width(x)), x.dtype, x.device)


def _gelu_of(tanh: bool) -> int:
    return GELU_TANH if tanh else GELU


def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _backward_fake(_grad_out: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *ctx.own, ctx.dropout_p, seed, ctx.rng_offset = inputs
    ctx.save_for_backward(x, seed)


@register_cuda("geglu")
def _geglu_cuda(x: Tensor, tanh: bool, *given: Any) -> Tensor:
    from . import gated_activation_triton

    _check(x, *given)
    return gated_activation_triton.forward(x, _gelu_of(tanh), *given)


@register_cuda("geglu_backward")
def _geglu_backward_cuda(grad_out: Tensor, x: Tensor, tanh: bool, *given: Any) -> Tensor:
    from . import gated_activation_triton

    _check_backward(grad_out, x, *given)
    return gated_activation_triton.backward(grad_out, x, _gelu_of(tanh), *given)


@register_cuda("swiglu")
def _swiglu_cuda(x: Tensor, *given: Any) -> Tensor:
    from . import gated_activation_triton

    _check(x, *given)
    return gated_activation_triton.forward(x, SILU, *given)


@register_cuda("swiglu_backward")
def _swiglu_backward_cuda(grad_out: Tensor, x: Tensor, *given: Any) -> Tensor:
    from . import gated_activation_triton

    _check_backward(grad_out, x, *given)
    return gated_activation_triton.backward(grad_out, x, SILU, *given)


def _register(name: str, instead: str) -> None:
    """Register all but the kernels of an operator and its backward pass."""
    run_backward = getattr(_ops, f"{name}_backward")

    @differentiable_once(name, instead)
    def backward(
        ctx: Any, saved: tuple[Tensor, Tensor | None], grad_out: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, seed = saved
        grad_x = run_backward(grad_out, x, *ctx.own, ctx.dropout_p, seed, ctx.rng_offset)
        return grad_x, *[None] * (len(ctx.own) + 3)

    register_fake(name)(_fake)
    register_fake(f"{name}_backward")(_backward_fake)
    for operator in (name, f"{name}_backward"):
        declare(operator, cpu="cpp", cuda="triton")
    register_derivative(name, backward, _setup_context, name=name, instead=instead)
    refuse_vmap(f"{name}_backward", name=name, instead=instead)


_register("geglu", "torch.nn.functional.gelu, or float64")
_register("swiglu", "torch.nn.functional.silu, or float64")


# ---- public -------------------------------------------------------------------------------------


def _checked_dropout(
    x: Tensor, dropout_p: float, training: bool, seed: Tensor | None, rng_offset: int
) -> tuple[float, Tensor | None, int]:
    """Check the arguments, and return those of the operator's dropout."""
    check_input("x", x)
    _width(x)
    check_dropout(dropout_p, seed, rng_offset, x.device)
    check_data(seed=seed)
    if not training or dropout_p == 0:
        return 0.0, None, rng_offset
    return dropout_p, new_seed(x.device) if seed is None else seed, rng_offset


def _in_float64(
    x: Tensor, activation: int, p: float, seed: Tensor | None, rng_offset: int
) -> Tensor:
    y = gated_activation_reference(x, activation)
    return dropout(y, p, seed=seed, rng_offset=rng_offset)


def geglu(
    x: Tensor,
    *,
    approximate: str = "none",
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> Tensor:
    """Gate by GELU, with dropout behind: ``dropout(gelu(x[..., :I]) * x[..., I:])``.

    Liger's function of that name takes the halves apart and has GELU by tanh:
    ``geglu(torch.cat([a, b], -1), approximate="tanh")`` is its ``liger_geglu(a, b)``.

    Args:
        x: ``[..., 2 I]``; float32, bfloat16, float16 (or float64, by the reference).
        approximate: of GELU, as in `torch.nn.functional.gelu`: ``"none"``, by erf, or ``"tanh"``.
        dropout_p: probability to drop an element of the result, ``0 <= dropout_p < 1``.
        training: without it there is no dropout.
        seed: of dropout; int64, one element, on x's device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.

    Returns:
        ``[..., I]`` in the dtype of x, contiguous: with dropout what `kernels.dropout` makes of the
        result without it, with the same seed and offset.

    Raises:
        TypeError: x is no tensor.
        ValueError: an odd last dimension, an argument out of range, or x or a seed of the wrong
            dtype or device; the message names it.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    dropped = _checked_dropout(x, dropout_p, training, seed, rng_offset)
    tanh = approximate == "tanh"
    if x.dtype == torch.float64:
        return _in_float64(x, _gelu_of(tanh), *dropped)
    out: Tensor = _ops.geglu(x, tanh, *dropped)
    return out


def swiglu(
    x: Tensor,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> Tensor:
    """Gate by SiLU, with dropout behind: ``dropout(silu(x[..., :I]) * x[..., I:])``.

    ``swiglu(torch.cat([a, b], -1))`` is Liger's ``liger_swiglu(a, b)``.

    Args:
        x: ``[..., 2 I]``; float32, bfloat16, float16 (or float64, by the reference).
        dropout_p: probability to drop an element of the result, ``0 <= dropout_p < 1``.
        training: without it there is no dropout.
        seed: of dropout; int64, one element, on x's device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.

    Returns:
        ``[..., I]`` in the dtype of x, contiguous, as :func:`geglu` gives it.

    Raises:
        TypeError: x is no tensor.
        ValueError: an odd last dimension, an argument out of range, or x or a seed of the wrong
            dtype or device; the message names it.
    """
    dropped = _checked_dropout(x, dropout_p, training, seed, rng_offset)
    if x.dtype == torch.float64:
        return _in_float64(x, SILU, *dropped)
    out: Tensor = _ops.swiglu(x, *dropped)
    return out
