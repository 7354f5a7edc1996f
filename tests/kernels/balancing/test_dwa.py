"""Dynamic weight average."""

import pytest
import torch

from kernels import balancing

from .scalarizations import GRAM, derivatives, steps_of_losses


@pytest.mark.parametrize("window", [1, 3])
def test_agrees_with_torchjd_whose_epochs_are_the_windows(window: int) -> None:
    oracle = pytest.importorskip("torchjd.scalarization").DWA(temperature=0.5)
    state = None
    for step, losses in enumerate(steps_of_losses(6 * window + 1), 1):
        weights, state = balancing.dwa(GRAM, losses, state, temperature=0.5, window=window)
        torch.testing.assert_close(weights, derivatives(oracle, losses))
        assert (step <= 2 * window) == torch.equal(weights, torch.ones_like(weights))
        if step % window == 0:
            oracle.step()


def test_is_the_published_softmax_of_rates() -> None:
    windows = [torch.stack(list(steps_of_losses(9)))[begin : begin + 3] for begin in (0, 3)]
    state = None
    for losses in torch.cat(windows):
        _, state = balancing.dwa(GRAM, losses, state, window=3)
    weights, _ = balancing.dwa(GRAM, torch.ones(4), state, window=3)
    before, last = (window.mean(0) for window in windows)
    torch.testing.assert_close(weights, 4 * (last / before / 2).softmax(0))


def test_a_mean_of_0_has_no_rate() -> None:
    state = None
    for losses in ([0.0, 1.0, 2.0, 0.0], [5.0, 1.0, 1.0, 0.0], [1.0] * 4):
        weights, state = balancing.dwa(GRAM, torch.tensor(losses), state, window=1)
    expected = 4 * (torch.tensor([1.0, 1.0, 0.5, 1.0]).double() / 2).softmax(0)
    torch.testing.assert_close(weights, expected)


def test_bad_arguments() -> None:
    for bad in (0.0, -1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match=r"^temperature: expected a finite number above 0"):
            balancing.dwa(GRAM, torch.ones(4), temperature=bad)
    with pytest.raises(ValueError, match=r"^window: expected at least 1 step, got 0"):
        balancing.dwa(GRAM, torch.ones(4), window=0)
