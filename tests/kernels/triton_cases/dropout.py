"""Dropout's Triton kernel."""

import pytest
import torch

from kernels.dropout import dropout_triton
from kernels.dropout.dropout import dropout_factors


@pytest.mark.parametrize("count", [0, 3, 4096, 5001])
def test_dropout(count: int, device: str) -> None:
    x, seed = torch.randn(count, device=device), torch.tensor(-3, device=device)
    expected = x * dropout_factors(count, 0.3, seed, 2**32 - 1)
    assert torch.equal(dropout_triton.dropout(x, 0.3, seed, 2**32 - 1), expected)
