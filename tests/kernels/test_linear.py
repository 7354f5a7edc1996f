"""A linear layer's forward pass against float64; its task gradients are in test_task_layers.py.

Shapes (rows, outputs, inputs): no row, one of each, primes, just off a power of two, and a layer
of BERT's width.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels.linear.linear import joint_linear

from .tolerance import assert_within_twice

SHAPES = [(0, 5, 7), (1, 1, 1), (13, 31, 7), (127, 65, 129), (257, 384, 384)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, outputs, inputs = shape
    sizes = ((rows, inputs), (outputs, inputs), (outputs,))
    x, weight, bias = (torch.randn(size).to(dtype) for size in sizes)
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [False, True])
def test_forward(shape: tuple[int, int, int], dtype: torch.dtype, biased: bool) -> None:
    arguments = operands(shape, dtype)[: 3 if biased else 2]
    exact = F.linear(*(tensor.double() for tensor in arguments))
    with torch.no_grad():
        assert_within_twice(kernels.linear(*arguments), F.linear(*arguments), exact)


def test_a_stream_of_several_dimensions() -> None:
    _, weight, bias = operands((13, 31, 7), torch.bfloat16)
    x = torch.randn(2, 3, 7).bfloat16()
    with torch.no_grad():
        inside = kernels.linear(x, weight, bias)
    torch.testing.assert_close(inside, F.linear(x, weight, bias))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_rows_without_columns_for_a_frozen_parameter(frozen: str) -> None:
    x, weight, bias = operands((13, 31, 7), torch.float32)
    whole = kernels.new_task_rows(2, weight, bias)
    part = kernels.new_task_rows(2, weight, bias)._replace(**{f"{frozen}_columns": None})
    for rows in (whole, part):
        own = {"weight": weight.clone(), "bias": bias.clone()}
        for name, parameter in own.items():
            parameter.requires_grad_(rows is whole or name != frozen)
        leaf = x.clone().requires_grad_()
        segments = kernels.TaskSegments((0, 5, 13))
        out = kernels.linear(leaf, own["weight"], own["bias"], rows=rows, segments=segments)
        out.square().sum().backward()
    trained = "bias" if frozen == "weight" else "weight"
    assert torch.equal(getattr(part, trained), getattr(whole, trained))
    assert part.buffer.count_nonzero() == getattr(whole, trained).numel()


def test_a_bias_of_other_strides_is_read_as_it_is() -> None:
    x, weight = torch.randn(6, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    for bias in (torch.arange(10).bfloat16()[::2], torch.ones(1).bfloat16().expand(5)):
        with torch.no_grad():
            torch.testing.assert_close(kernels.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 129])  # one product from 16 on, for 64 columns
def test_joint_layers(rows: int, biased: bool, dtype: torch.dtype) -> None:
    """Layers of several widths: outputs and gradients are those of each by itself."""
    x = torch.randn(rows, 64, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n, 64, dtype=dtype, requires_grad=True) for n in (31, 64, 1)]
    biases = [
        torch.randn(len(w), dtype=dtype, requires_grad=True) if biased else None for w in weights
    ]
    leaves = [leaf for leaf in (x, *weights, *biases) if leaf is not None]
    grad = torch.randn(rows, 96, dtype=dtype)

    def alone(*tensors: Tensor) -> Tensor:
        x, *layers = tensors
        pairs = zip(layers[:3], layers[3:] or [None] * 3, strict=True)
        return torch.cat([F.linear(x, *pair) for pair in pairs], -1)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    outputs = joint_linear(x, weights, biases), alone(*leaves), alone(*exact)
    assert_within_twice(*outputs)
    gradients = [
        torch.autograd.grad(out, own, grad.to(out.dtype))
        for out, own in zip(outputs, (leaves, leaves, exact), strict=True)
    ]
    for found, torchs, expected in zip(*gradients, strict=True):
        assert_within_twice(found, torchs, expected)
    with torch.no_grad():
        assert_within_twice(joint_linear(x, weights, biases), outputs[1], outputs[2])


def test_joint_layers_need_as_many_biases() -> None:
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    for biases in ([torch.zeros(2), None], [None], [None] * 3):
        with pytest.raises(ValueError, match="biases: expected 2 or none"):
            joint_linear(x, [weight, weight], biases)
