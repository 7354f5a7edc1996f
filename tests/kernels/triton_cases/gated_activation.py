"""The Triton kernels of gated activations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.dropout import dropout_triton
from kernels.gated_activation import gated_activation_triton as gated
from kernels.gated_activation.gated_activation import (
    GELU,
    GELU_TANH,
    SILU,
    gated_activation_reference,
)

from ..gated_tails import tail_of
from ..tolerance import assert_within_twice

ACTIVATIONS = pytest.mark.parametrize("activation", [GELU, GELU_TANH, SILU])
WITHOUT = (0.0, None, 0)


def both(x: Tensor, grad_out: Tensor, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad_out)]


# Nothing; one row, several rows of a program; widths below a tile, of several and no multiple.
@pytest.mark.parametrize(
    ("rows", "width"), [(0, 8), (5, 0), (1, 4), (3, 7), (37, 64), (2, 1152), (3, 2050)]
)
@ACTIVATIONS
def test_gated_activation(rows: int, width: int, activation: int, device: str) -> None:
    x = 3 * torch.randn(rows, 2 * width, device=device)
    grad_out = torch.randn(rows, width, device=device)

    def plain(y: Tensor) -> Tensor:
        return gated_activation_reference(y, activation)

    found = [
        gated.forward(x, activation, *WITHOUT),
        gated.backward(grad_out, x, activation, *WITHOUT),
    ]
    exact = both(x.double(), grad_out.double(), plain)
    for tensors in zip(found, both(x, grad_out, plain), exact, strict=True):
        assert_within_twice(*tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [8, 7, 1152])
def test_dropout_behind_a_gated_activation(width: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, 2 * width, device=device).to(dtype)
    grad_out = torch.randn(5, width, device=device).to(dtype)
    given = (0.3, torch.tensor(-3, device=device), 2**32 - 1)
    alone = gated.forward(x, GELU, *WITHOUT)
    dropped = dropout_triton.dropout(alone, *given)
    assert torch.equal(gated.forward(x, GELU, *given), dropped)
    grad = gated.backward(dropout_triton.dropout(grad_out, *given), x, GELU, *WITHOUT)
    assert torch.equal(gated.backward(grad_out, x, GELU, *given), grad)


@ACTIVATIONS
def test_gated_activation_of_large_and_tiny_numbers(activation: int, device: str) -> None:
    values = [-1e30, -1e4, -104.5, -50.0, -13.0, -5.0, -0.0, 0.0, 1e-40, 5.0, 50.0, 1e4, 1e30]
    a = torch.tensor(values, device=device)
    x = torch.stack([a, torch.ones_like(a)], 1)
    exact, relative = tail_of(a.double(), activation)
    found = gated.forward(x, activation, *WITHOUT)[:, 0]
    smallest = torch.finfo(torch.float32).tiny  # a GPU may take less for zero
    assert ((found - exact).abs() <= relative * exact.abs() + smallest).all()
    grad = gated.backward(torch.ones_like(a)[:, None], x, activation, *WITHOUT)
    assert grad[:, 0].isfinite().all()
    assert grad[0, 0] == 0
    assert grad[-1, 0] == 1
