"""FAMO."""

import pytest
import torch
from torch import Tensor

from kernels import balancing

from .scalarizations import GRAM, derivatives, steps_of_losses


def test_is_algorithm_1_by_autograd_and_torchs_adam() -> None:
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1, weight_decay=0.01)
    state: object = None
    before: Tensor | None = None
    for losses in steps_of_losses(60):
        if before is not None:
            falls = before.log() - losses.log()
            (logits.grad,) = torch.autograd.grad(logits.softmax(0), logits, falls)
            optimizer.step()
        shares = logits.detach().softmax(0)
        scale = 1 / (shares / losses).sum()
        expected = derivatives(lambda x, z=shares, c=scale: c * (z * x.log()).sum(), losses)
        weights, state = balancing.famo(GRAM, losses, state, lr=0.1, gamma=0.01)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(state.logits, logits.detach(), rtol=1e-9, atol=1e-12)
        before = losses


def test_agrees_with_torchjd_that_gets_the_next_steps_losses() -> None:
    scalarization = pytest.importorskip("torchjd.scalarization")
    oracle, state = scalarization.FAMO(4).double(), None
    for number, losses in enumerate(steps_of_losses(20)):
        if number:
            oracle.update(losses)
        weights, state = balancing.famo(GRAM, losses, state)
        # TorchJD adds 1e-8 to losses of 0.01.
        torch.testing.assert_close(weights, derivatives(oracle, losses), rtol=1e-5, atol=0)


def test_the_task_that_falls_slowest_gains_weight() -> None:
    state, rates = None, torch.tensor([0.99, 0.9, 0.9, 0.8]).double()
    for step in range(20):
        state = balancing.famo(GRAM, rates**step, state, gamma=0.0).state
    logits = state.logits
    assert logits[0] > logits[1] > logits[3]
    torch.testing.assert_close(logits[1], logits[2])


def test_a_loss_of_0_is_left_out_and_has_no_fall() -> None:
    state = balancing.famo(GRAM, torch.tensor([1.0, 2.0, 0.0, 4.0]), None).state
    step = balancing.famo(GRAM, torch.tensor([1.0, 0.0, 5.0, 4.0]), state)
    assert torch.equal(step.state.logits, torch.zeros(4).double())  # the others have not moved
    torch.testing.assert_close(step.weights, torch.tensor([20.0, 0, 4, 5]).double() / 29)
    assert balancing.famo(GRAM, torch.zeros(4), None).weights.tolist() == [0.0] * 4


def test_bad_arguments() -> None:
    for name in ("lr", "gamma"):
        for bad in (-1.0, torch.nan, torch.inf, 1e39):
            with pytest.raises(ValueError, match=rf"^{name}: expected a finite number of at least"):
                balancing.famo(GRAM, torch.ones(4), **{name: bad})
