"""GradNorm."""

import pytest
import torch

from kernels import balancing


def test_gradnorm_pulls_norms_together() -> None:
    gram, weights = torch.diag(torch.tensor([1.0, 100.0])), torch.ones(2)
    for _ in range(500):
        weights = balancing.gradnorm(gram, weights, torch.ones(2), lr=0.005)
    torch.testing.assert_close(weights, torch.tensor([20 / 11, 2 / 11]), rtol=0.1, atol=0)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match=r"loss_ratios: expected \[3\], got \[1\]"):
        balancing.gradnorm(matrix, torch.ones(3), torch.ones(1))
