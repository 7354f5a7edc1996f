"""Geometric loss strategy."""

import pytest
import torch

from kernels import balancing

from .scalarizations import GRAM, derivatives, steps_of_losses


def test_is_the_derivative_of_the_geometric_mean() -> None:
    for losses in steps_of_losses(10):
        expected = derivatives(lambda x: x.prod() ** (1 / 4), losses)
        torch.testing.assert_close(balancing.gls(GRAM, losses), expected)


def test_agrees_with_torchjd() -> None:
    oracle = pytest.importorskip("torchjd.scalarization").GeometricMean()
    for losses in steps_of_losses(10):
        torch.testing.assert_close(balancing.gls(GRAM, losses), derivatives(oracle, losses))


def test_a_loss_of_0_is_left_out() -> None:
    weights = balancing.gls(GRAM, torch.tensor([2.0, 0.0, 8.0, 0.0]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, 0.25, 0.0]).double())
    assert balancing.gls(GRAM, torch.zeros(4)).tolist() == [0.0] * 4


def test_weights_beyond_the_dtype_are_made_smaller_alike() -> None:
    losses = torch.tensor([1e-300, 1e-300, 1.0, 1e300], dtype=torch.float64)
    weights = balancing.gls(GRAM.float(), losses)
    assert weights.isfinite().all()
    assert weights[0] == weights[1] > 1e37
