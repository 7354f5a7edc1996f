"""Pooling of token states."""

import pytest
import torch

from engine.models.pooling import POOLINGS, pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_empty_sequences_give_zeros_and_change_nothing(pooling: str, dtype: torch.dtype) -> None:
    """Padding may be cut into them, before, between and behind others."""
    hidden = torch.randn(30, 5).to(dtype).requires_grad_()
    plain, padded = [0, 3, 4, 30], [0, 0, 3, 3, 3, 4, 30, 30]
    own = [1, 4, 5]
    grad = torch.randn(3, 5).to(dtype)
    vectors = pool(hidden, torch.tensor(plain, dtype=torch.int32), pooling)
    found = pool(hidden, torch.tensor(padded, dtype=torch.int32), pooling)
    assert torch.equal(found[own], vectors)
    assert found.count_nonzero(1).tolist() == [0, 5, 0, 0, 5, 5, 0]
    (expected,) = torch.autograd.grad(vectors, hidden, grad)
    (given,) = torch.autograd.grad(found[own], hidden, grad)
    assert torch.equal(given, expected)
