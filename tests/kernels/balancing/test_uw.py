"""Uncertainty weighting."""

import pytest
import torch

from kernels import balancing
from kernels.balancing.learned import LIMIT
from kernels.balancing.states import Learned, initial_state

from .scalarizations import GRAM, derivatives, steps_of_losses


def test_is_the_published_loss_with_its_variances_trained_by_torchs_adam() -> None:
    """Kendall et al.'s equation, its derivatives and those of the variances by autograd."""
    variances = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer, state = torch.optim.Adam([variances], lr=0.1), None

    def total(losses: torch.Tensor) -> torch.Tensor:
        return (losses * torch.exp(-variances) / 2 + variances / 2).sum()

    for losses in steps_of_losses(60):
        weights, state = balancing.uw(GRAM, losses, state, lr=0.1)
        torch.testing.assert_close(weights, derivatives(total, losses))
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        torch.testing.assert_close(state.values, variances.detach(), rtol=1e-9, atol=1e-12)


def test_agrees_with_torchjd() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    oracle, state = scalarization.UW(4).double(), None
    optimizer = torch.optim.Adam(oracle.parameters(), lr=0.025)
    for losses in steps_of_losses(20):
        weights, state = balancing.uw(GRAM, losses, state)
        torch.testing.assert_close(weights, derivatives(oracle, losses))
        optimizer.zero_grad()
        oracle(losses).backward()
        optimizer.step()


def test_variances_come_to_the_losses() -> None:
    state, losses = None, torch.tensor([0.1, 1.0, 20.0, 3.0])
    for _ in range(1000):
        weights, state = balancing.uw(GRAM.float(), losses, state)
    torch.testing.assert_close(state.values.exp(), losses, rtol=0.01, atol=0)
    torch.testing.assert_close(weights * losses, torch.full((4,), 0.5), rtol=0.01, atol=0)


@pytest.mark.parametrize("loss", [0.0, -1.0, -1e30])
def test_a_loss_without_an_optimum_ends_at_the_limit(loss: float) -> None:
    state, losses = None, torch.tensor([loss, 1.0, 1.0, 1.0])
    for _ in range(200):
        weights, state = balancing.uw(GRAM.float(), losses, state, lr=1.0)
    assert state.values[0] == -LIMIT
    assert weights.isfinite().all()
    assert weights[1:].tolist() == [0.5] * 3


def test_bad_arguments() -> None:
    for bad in (-1.0, torch.nan, torch.inf, 1e39):
        with pytest.raises(ValueError, match=r"^lr: expected a finite number of at least 0"):
            balancing.uw(GRAM, torch.ones(4), lr=bad)
    state = initial_state(Learned, 3)
    with pytest.raises(ValueError, match=r"^state.values: expected \[4\], got \[3\]"):
        balancing.uw(GRAM, torch.ones(4), state)
