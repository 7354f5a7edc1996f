"""The Triton kernels that take rows."""

import pytest
import torch

from kernels.take_rows import take_rows_triton
from kernels.take_rows.take_rows import take_rows_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [13, 1100])
@pytest.mark.parametrize("rows", [[], [4, 0, -1, 3], [-1, 5, 2**40, -(2**40)]], ids=str)
def test_take_rows(rows: list[int], width: int, dtype: torch.dtype, device: str) -> None:
    x = torch.randn(5, width, device=device).to(dtype).requires_grad_()
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    expected = take_rows_reference(x, index)
    grad_out = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(expected, x, grad_out)
    assert torch.equal(take_rows_triton.forward(x.detach(), index), expected)
    assert torch.equal(take_rows_triton.backward(grad_out, index, 5), grad)
