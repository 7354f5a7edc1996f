"""Weights in proportion to sizes."""

import pytest
import torch

from kernels import balancing


def test_weights_are_the_shares() -> None:
    weights = balancing.proportional(torch.eye(3), torch.tensor([1, 2, 5]))
    assert torch.equal(weights, torch.tensor([0.125, 0.25, 0.625]))


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match=r"sizes: expected \[3\], got \[2\]"):
        balancing.proportional(matrix, torch.ones(2))
