"""A linear layer's forward pass against float64; its task gradients are in test_task_layers.py.

Shapes (rows, outputs, inputs): no row, one of each, primes, just off a power of two, and a layer
of BERT's width.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import kernels
from kernels.linear import linear as module
from kernels.linear.linear import HAS_ONEDNN, MULTIPLIES_BF16, joint_linear

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


# ---- who multiplies -----------------------------------------------------------------------------


def operators_of(call: Callable[[], object]) -> set[str]:
    """Return the names of this project's operators for linear layers that a call runs."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        call()
    names = {event.key.removeprefix("superbert::") for event in profiled.key_averages()}
    return {name for name in names if name == "onednn_linear" or name.startswith("linear_bf16")}


def train_by_task(dtype: torch.dtype, rows_dtype: torch.dtype | None = None) -> None:
    """A forward and a backward pass with task rows."""
    leaves = [leaf.requires_grad_() for leaf in operands((13, 31, 7), dtype)]
    rows = kernels.new_task_rows(2, *(leaf.detach().to(rows_dtype) for leaf in leaves[1:]))
    segments = kernels.TaskSegments((0, 5, 13))
    kernels.linear(*leaves, rows=rows, segments=segments).float().square().sum().backward()


def forward(dtype: torch.dtype) -> None:
    with torch.no_grad():
        kernels.linear(*operands((13, 31, 7), dtype))


OWN = {"linear_bf16", "linear_bf16_grad_input", "linear_bf16_task_gradients_"}
ONEDNN = {"onednn_linear"} if HAS_ONEDNN else set()
needs_bf16 = pytest.mark.skipif(not MULTIPLIES_BF16, reason="this processor has no AVX512_BF16")


@needs_bf16
def test_bf16_products_are_this_projects() -> None:
    assert operators_of(lambda: train_by_task(torch.bfloat16)) == OWN
    assert operators_of(lambda: forward(torch.bfloat16)) == {"linear_bf16"}
    x, weight, bias = operands((13, 31, 7), torch.bfloat16)
    with torch.no_grad():
        assert operators_of(lambda: kernels.linear(x, weight)) == {"linear_bf16"}
        assert operators_of(lambda: joint_linear(x, [weight] * 2, [bias] * 2)) == {"linear_bf16"}


@needs_bf16
def test_float32_rows_of_bf16_streams_are_this_projects() -> None:
    grad, x = torch.randn(13, 31).bfloat16(), torch.randn(13, 7).bfloat16()
    rows = torch.zeros(2, 31, 7), torch.zeros(2, 31)
    run = module.linear_task_gradients_
    ran = operators_of(lambda: run(grad, x, *rows, [0, 5, 13], False))
    assert ran == {"linear_bf16_task_gradients_"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_products_of_other_dtypes_are_torchs(dtype: torch.dtype) -> None:
    assert operators_of(lambda: train_by_task(dtype)) == set()
    assert operators_of(lambda: forward(dtype)) == set()


@needs_bf16
@pytest.mark.parametrize("wide", [torch.float16, torch.float64])
def test_gradient_rows_of_other_dtypes_are_torchs(wide: torch.dtype) -> None:
    grad, x = torch.randn(13, 31).bfloat16(), torch.randn(13, 7).bfloat16()
    run, rows = module.linear_task_gradients_, torch.zeros(2, 31, 7, dtype=wide)
    expected = torch.stack([grad[:5].t().mm(x[:5]), grad[5:].t().mm(x[5:])])
    none = torch.empty(0)
    assert operators_of(lambda: run(grad, x, rows, none, [0, 5, 13], False)) == set()
    assert torch.equal(rows, expected.to(wide))


def test_products_of_other_processors_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MULTIPLIES_BF16", False)
    assert operators_of(lambda: train_by_task(torch.bfloat16)) == ONEDNN
    assert operators_of(lambda: forward(torch.bfloat16)) == ONEDNN


@needs_bf16
def test_a_stream_that_autograd_differentiates_is_torchs() -> None:
    x, weight, bias = operands((13, 31, 7), torch.bfloat16)
    weight.requires_grad_()

    def train() -> None:
        kernels.linear(x, weight, bias).float().sum().backward()

    assert operators_of(train) == set()
    assert weight.grad is not None


@needs_bf16
@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_bits_by_task_as_at_once(shape: tuple[int, int, int]) -> None:
    """A task's gradients are those of a batch that has no other task."""
    x, weight, bias = operands(shape, torch.bfloat16)
    grad, half = torch.randn(shape[0], shape[1]).bfloat16(), shape[0] // 3
    offsets = [0, half, shape[0]]
    rows = torch.zeros(2, *weight.shape).bfloat16(), torch.zeros(2, *bias.shape).bfloat16()
    module.linear_task_gradients_(grad, x, *rows, offsets, False)
    for task in range(2):
        own = slice(*offsets[task : task + 2])
        alone = [torch.zeros_like(each[:1]) for each in rows]
        length = len(x[own])
        module.linear_task_gradients_(grad[own], x[own], *alone, [0, length], False)
        assert all(torch.equal(a[0], each[task]) for a, each in zip(alone, rows, strict=True))
