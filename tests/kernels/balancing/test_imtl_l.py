"""IMTL-L, and IMTL, which puts IMTL-G on top of it."""

import pytest
import torch

from kernels import balancing
from kernels.balancing.learned import LIMIT

from .methods import gradients
from .scalarizations import GRAM, derivatives, steps_of_losses


def test_is_the_published_loss_with_its_factors_trained_by_torchs_adam() -> None:
    scales = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer, state = torch.optim.Adam([scales], lr=0.1), None

    def total(losses: torch.Tensor) -> torch.Tensor:
        return (scales.exp() * losses - scales).sum()

    for losses in steps_of_losses(60):
        weights, state = balancing.imtl_l(GRAM, losses, state, lr=0.1)
        torch.testing.assert_close(weights, derivatives(total, losses))
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        torch.testing.assert_close(state.values, scales.detach(), rtol=1e-9, atol=1e-12)


def test_agrees_with_torchjd() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    oracle, state = scalarization.IMTLL(4).double(), None
    optimizer = torch.optim.Adam(oracle.parameters(), lr=0.025)
    for losses in steps_of_losses(20):
        weights, state = balancing.imtl_l(GRAM, losses, state)
        torch.testing.assert_close(weights, derivatives(oracle, losses))
        optimizer.zero_grad()
        oracle(losses).backward()
        optimizer.step()


@pytest.mark.parametrize("loss", [0.0, -1.0, -1e30])
def test_a_loss_without_an_optimum_ends_at_the_limit(loss: float) -> None:
    state, losses = None, torch.tensor([loss, 1.0, 1.0, 1.0])
    for _ in range(200):
        weights, state = balancing.imtl_l(GRAM.float(), losses, state, lr=1.0)
    assert state.values[0] == LIMIT
    assert weights.isfinite().all()


def test_imtl_is_imtl_g_of_the_scaled_losses_gradients() -> None:
    state, of_scales, rows = None, None, gradients(4, 7)
    for losses in steps_of_losses(30):
        weights, state = balancing.imtl(GRAM, losses, state, lr=0.1)
        scales, of_scales = balancing.imtl_l(GRAM, losses, of_scales, lr=0.1)
        scaled = scales[:, None] * rows
        expected = balancing.imtl_g(scaled @ scaled.T) @ scaled
        torch.testing.assert_close(weights @ rows, expected, rtol=1e-9, atol=1e-12)
        assert all(map(torch.equal, state, of_scales))
    direction = balancing.imtl_g(GRAM) @ rows
    torch.testing.assert_close(expected / expected.norm(), direction / direction.norm())
    assert not torch.allclose(expected.norm(), direction.norm(), rtol=0.1)


def test_bad_arguments() -> None:
    for method in (balancing.imtl_l, balancing.imtl):
        for bad in (-1.0, torch.nan, torch.inf, 1e39):
            with pytest.raises(ValueError, match=r"^lr: expected a finite number of at least 0"):
                method(GRAM, torch.ones(4), lr=bad)
