"""Rows that are taken once at most, against torch's indexing in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import take_rows
from kernels.take_rows.take_rows import take_rows_reference

from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

INDICES = [[], [0], [4, 0, -1, 3], [-1, 5, 2**40, -(2**63)], [4, 3, 2, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", INDICES, ids=str)
def test_rows_and_their_gradient(rows: list[int], dtype: torch.dtype) -> None:
    x, index = torch.randn(5, 7).to(dtype), torch.tensor(rows, dtype=torch.int64)
    grad = torch.randn(len(rows), 7).to(dtype)

    def run(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        out = function(leaf, index)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad.to(dtype))]

    found, torchs = run(take_rows, dtype), run(take_rows_reference, dtype)
    for tensors in zip(found, torchs, run(take_rows_reference, torch.float64), strict=True):
        assert_within_twice(*tensors)
    for number, row in enumerate(rows):
        expected = x[row] if 0 <= row < 5 else torch.zeros(7, dtype=dtype)
        assert torch.equal(found[0][number], expected)
        if 0 <= row < 5:
            assert torch.equal(found[1][row], grad[number])
    assert set(found[1].any(1).nonzero().flatten().tolist()) == {r for r in rows if 0 <= r < 5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_nothing(dtype: torch.dtype) -> None:
    x = torch.zeros(0, 3, dtype=dtype, requires_grad=True)
    out = take_rows(x, torch.tensor([0, -1]))
    assert torch.equal(out, torch.zeros(2, 3, dtype=dtype))
    assert torch.autograd.grad(out.sum(), x)[0].shape == (0, 3)


def test_other_rows_stay_finite() -> None:
    """Unlike a product with zero, a row that is not there takes nothing from any that is."""
    x = torch.tensor([[torch.nan], [1.0]], requires_grad=True)
    out = take_rows(x, torch.tensor([1, -1]))
    assert out.tolist() == [[1.0], [0.0]]
    (grad,) = torch.autograd.grad(out, x, torch.tensor([[2.0], [torch.inf]]))
    assert grad.tolist() == [[0.0], [2.0]]


def test_wrong_arguments() -> None:
    x = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        take_rows([1.0], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"x: expected \[T, H\]"):
        take_rows(x[0], torch.tensor([0]))
    with pytest.raises(ValueError, match=r"index: expected torch\.int64"):
        take_rows(x, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"index: expected \[m\]"):
        take_rows(x, torch.tensor(0))
    with pytest.raises(ValueError, match="index: expected each 0 <= index < num_rows once at most"):
        take_rows(x, torch.tensor([2, 0, 2])).sum().backward()
