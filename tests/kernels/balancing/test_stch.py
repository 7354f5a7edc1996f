"""Smooth Tchebycheff scalarization."""

import pytest
import torch

from kernels import balancing

from .scalarizations import GRAM, derivatives, steps_of_losses


@pytest.mark.parametrize("mu", [0.01, 0.3, 1.0, 20.0])
def test_is_the_published_loss_of_logarithms(mu: float) -> None:
    """As its code has it: over the mean losses of a warm-up, in which logarithms are summed."""
    state, seen = None, []
    for losses in steps_of_losses(12):
        weights, state = balancing.stch(GRAM, losses, state, mu=mu, warmup=5)
        if len(seen) < 5:
            seen.append(losses)
            expected = derivatives(lambda x: x.log().sum(), losses)
        else:
            nadir = torch.stack(seen).mean(0)
            expected = derivatives(
                lambda x, z=nadir: 4 * mu * torch.logsumexp((x / z).log() / mu, 0), losses
            )
        torch.testing.assert_close(weights, expected)


def test_agrees_with_torchjd_of_logarithms() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    oracle = scalarization.STCH(0.2, weights=torch.ones(4, dtype=torch.float64))
    first, *others = steps_of_losses(8)
    _, state = balancing.stch(GRAM, first, None, mu=0.2, warmup=1)
    for losses in others:
        weights, state = balancing.stch(GRAM, losses, state, mu=0.2, warmup=1)
        expected = derivatives(lambda x: 4 * oracle((x / first).log()), losses)
        torch.testing.assert_close(weights, expected)


def test_a_small_mu_takes_the_worst_task_alone() -> None:
    _, state = balancing.stch(GRAM, torch.tensor([1.0, 2.0, 3.0, 4.0]), None, warmup=1)
    losses = torch.tensor([1.0, 2.5, 3.0, 1.0])
    weights, _ = balancing.stch(GRAM, losses, state, mu=1e-9, warmup=1)
    torch.testing.assert_close(weights, torch.tensor([0.0, 4 / 2.5, 0.0, 0.0]).double())


def test_losses_of_0() -> None:
    """Left out; and where a warm-up has nothing else, the task stays at its measure."""
    weights, state = balancing.stch(GRAM, torch.tensor([0.0, 0.5, 1.0, 2.0]), None, warmup=1)
    torch.testing.assert_close(weights, torch.tensor([0.0, 2.0, 1.0, 0.5]).double())
    losses = torch.tensor([3.0, 0.0, 2.0, 2.0])
    weights, _ = balancing.stch(GRAM, losses, state, warmup=1)
    shares = torch.tensor([1.0, 0.0, 2.0, 1.0]) / 4  # l / z
    torch.testing.assert_close(weights, (4 * shares / losses).nan_to_num().double())
    assert balancing.stch(GRAM, torch.zeros(4), state, warmup=1).weights.tolist() == [0.0] * 4


def test_bad_arguments() -> None:
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"^mu: expected a finite number above 0"):
            balancing.stch(GRAM, torch.ones(4), mu=bad)
    with pytest.raises(ValueError, match=r"^warmup: expected at least 1 step, got 0"):
        balancing.stch(GRAM, torch.ones(4), warmup=0)
