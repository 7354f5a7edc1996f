"""Layer norms of rows that are constant or nearly so, whose 1 / deviation magnifies roundings."""

from collections.abc import Callable
from itertools import pairwise, product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import (
    FusedLayerNorm,
    TaskSegments,
    dropout_add_layer_norm,
    embedding_layer_norm,
    layer_norm,
    layer_norm_fn,
    new_task_rows,
)
from kernels.dropout.dropout import dropout_factors

from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [1, 2, 3, 64, 768, 1000]
CONSTANTS = [0.1, 500.0]
# In float32 no sum is rounded after its statistics; what noise leaves of them is as torch's.
NOISE = {torch.float32: (0,), torch.bfloat16: (0, 1), torch.float16: (0, 1)}
SEED = torch.tensor(7)
TASKS = 4  # as many sums for each weight, so that the largest error is no matter of luck


class Options(NamedTuple):
    """What a norm is given beside its rows."""

    p: float = 0.0
    residual: bool = True
    x_bias: bool = False
    affine: bool = True


OPTIONS = [
    (1e-12, Options()),
    (1e-5, Options()),
    (1e-12, Options(affine=False)),
    (1e-12, Options(residual=False)),
    (1e-12, Options(p=0.1)),
    (1e-5, Options(p=0.1, x_bias=True)),
    (1e-12, Options(x_bias=True)),
]


def nearly(constant: float, shape: tuple[int, ...], noise: int, dtype: torch.dtype) -> Tensor:
    """A constant, give or take ``noise`` ulp."""
    relative = torch.finfo(dtype).eps * torch.randint(-noise, noise + 1, shape)
    return (torch.tensor(constant).to(dtype).double() * (1 + relative)).to(dtype)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Leaves of the dtype; a None stays one."""
    return [None if t is None else t.to(dtype).requires_grad_() for t in tensors]


class Case:
    """One batch of rows and the gradient of their norm."""

    def __init__(
        self, width: int, dtype: torch.dtype, constant: float, noise: int, eps: float, own: Options
    ) -> None:
        shape = (TASKS * max(1, min(64, 256 // width)), width)
        self.dtype, self.eps, self.own = dtype, eps, own
        # What dropout leaves of x must not be much beside the residual.
        self.x = nearly(constant / 64 if own.p else constant, shape, noise, dtype)
        self.residual = nearly(3 * constant, shape, noise, dtype) if own.residual else None
        self.x_bias = nearly(constant / 80, (width,), 0, dtype) if own.x_bias else None
        self.weight = (1 + 0.5 * torch.randn(width)).to(dtype) if own.affine else None
        self.bias = torch.randn(width).to(dtype) if own.affine else None
        # Small, so that no gradient overflows where 1 / deviation is 1e6.
        self.grad_out = (1e-3 * torch.randn(shape)).to(dtype)
        self.factors = dropout_factors(shape[0] * width, own.p, SEED, 0).view(shape)
        self.offsets = tuple(range(0, shape[0] + 1, shape[0] // TASKS))

    def kernel(self) -> list[Tensor]:
        """The output, the weight's gradients by task, and the gradients of x and residual."""
        x, residual = cast(self.dtype, self.x, self.residual)
        rows, segments = None, TaskSegments(self.offsets)
        if self.weight is not None:
            rows = new_task_rows(TASKS, self.weight, self.bias)
        out = dropout_add_layer_norm(
            *(x, residual, self.weight, self.bias, self.own.p, self.eps),
            **{"x_bias": self.x_bias, "seed": SEED, "rows": rows, "segments": segments},
        )
        leaves = [leaf for leaf in (x, residual) if leaf is not None]
        grads = torch.autograd.grad(out, leaves, self.grad_out)
        weight_rows = self.x[:0] if rows is None else rows.weight
        return [out.detach(), weight_rows, *grads]

    def torchs(self, dtype: torch.dtype) -> list[Tensor]:
        """The same by torch."""
        x, residual, x_bias, weight, bias = cast(
            dtype, self.x, self.residual, self.x_bias, self.weight, self.bias
        )
        hidden = x if x_bias is None else x + x_bias
        hidden = hidden * self.factors.to(dtype) if self.own.p else hidden
        hidden = hidden if residual is None else hidden + residual
        out = F.layer_norm(hidden, hidden.shape[-1:], weight, bias, self.eps)
        leaves = [leaf for leaf in (x, residual) if leaf is not None]
        grad_out = self.grad_out.to(dtype)
        grads = torch.autograd.grad(out, leaves, grad_out, retain_graph=True)
        weight_rows = self.x[:0]
        if weight is not None:
            by_task = []
            for begin, end in pairwise(self.offsets):
                own = torch.zeros_like(out)
                own[begin:end] = grad_out[begin:end]
                by_task += torch.autograd.grad(out, weight, own, retain_graph=True)
            weight_rows = torch.stack(by_task)
        return [out.detach(), weight_rows, *grads]


def assert_all_within_twice(found: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    for own, torchs_own, exact_own in zip(found, torchs, exact, strict=True):
        assert own.isfinite().all()
        if torchs_own.isfinite().all():  # torch's may overflow in float16
            assert_within_twice(own, torchs_own, exact_own)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rows_that_are_nearly_constant(width: int, dtype: torch.dtype) -> None:
    for constant, noise, (eps, own) in product(CONSTANTS, NOISE[dtype], OPTIONS):
        case = Case(width, dtype, constant, noise, eps, own)
        assert_all_within_twice(case.kernel(), case.torchs(dtype), case.torchs(torch.float64))


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_each_vector_unit(dtype: torch.dtype) -> None:
    for width, noise in product((3, 64, 1000), NOISE[dtype]):
        case = Case(width, dtype, 0.1, noise, 1e-12, Options())
        assert_all_within_twice(case.kernel(), case.torchs(dtype), case.torchs(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_embeddings_that_are_nearly_constant(width: int, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 6, (3, 60)).unbind(0)
    for constant, noise, eps in product(CONSTANTS, NOISE[dtype], (1e-12, 1e-5)):
        tables = [nearly(constant * k, (6, width), noise, dtype) for k in (1, 2, 4)]
        grad_out = (1e-3 * torch.randn(60, width)).to(dtype)
        results = []
        for own in (dtype, dtype, torch.float64):
            leaves = cast(own, *tables)
            if results:
                hidden = sum(table[index] for table, index in zip(leaves, ids, strict=True))
                out = F.layer_norm(hidden, (width,), eps=eps)
            else:
                out = embedding_layer_norm(*ids, *leaves, None, None, eps=eps)
            results.append([out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(own))])
        assert_all_within_twice(*results)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["layer_norm", "FusedLayerNorm", "layer_norm_fn", "dropout_add"])
def test_a_constant_row_has_the_gradient_of_its_deviation(
    name: str, width: int, dtype: torch.dtype
) -> None:
    """``dh = (g - mean(g)) / sqrt(eps)`` exactly: 3.6e6, where 7.9e9 has been seen."""
    norms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "layer_norm": lambda x, _: layer_norm(x, eps=1e-6),
        "FusedLayerNorm": lambda x, _: FusedLayerNorm(width, 1e-6, elementwise_affine=False)(x),
        "layer_norm_fn": lambda x, residual: layer_norm_fn(x, None, None, residual),
        "dropout_add": lambda x, residual: dropout_add_layer_norm(
            x, residual, None, None, epsilon=1e-6
        ),
    }
    x, residual = (torch.full((3, width), c, dtype=dtype) for c in (0.1, 0.3))
    x.requires_grad_()
    grad_out = torch.randn(3, width).to(dtype)
    out = norms[name](x, residual)
    (grad,) = torch.autograd.grad(out, x, grad_out)
    exact = grad_out.double() - grad_out.double().mean(-1, keepdim=True)
    assert out.abs().max() <= torch.finfo(torch.float32).eps
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(grad.double(), 1e3 * exact, rtol=tolerance, atol=1e3 * 3e-7)
