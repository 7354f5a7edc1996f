"""Constant weights."""

import torch

from kernels import balancing


def test_weights() -> None:
    assert torch.equal(balancing.sum(torch.eye(4)), torch.ones(4))
    assert torch.equal(balancing.mean(torch.eye(4)), torch.full((4,), 0.25))
