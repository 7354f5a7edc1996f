"""Gradient vaccine."""

import pytest
import torch

from kernels import balancing, draw_order, gram

from .methods import gradients


def test_gradvac_agrees_with_torchjd(torchjd) -> None:
    oracle, targets = torchjd.GradVacWeighting(beta=0.5), torch.zeros(4, 4, dtype=torch.float64)
    for step in range(6):
        rows = gradients(4, step)
        torch.manual_seed(step)
        expected = oracle(rows @ rows.T)
        torch.manual_seed(step)  # the same order, its own task put last, where it is passed over
        order = []
        for task in range(4):
            others = [other for other in range(4) if other != task]
            order.append([others[i] for i in torch.randperm(3).tolist()] + [task])
        weights, targets = balancing.gradvac(rows @ rows.T, torch.tensor(order), targets)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_gradvac_does_not_remember_a_gradient_that_is_not_finite() -> None:
    rows, order = gradients(4, 3), draw_order(4, 3)
    targets = balancing.gradvac(gram(rows), order, torch.zeros(4, 4)).targets
    assert targets.count_nonzero() > 0
    rows[1, 5] = torch.nan
    step = balancing.gradvac(gram(rows), order, targets)
    assert step.weights.isnan().all()
    assert torch.equal(step.targets, targets)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    for bad in (-0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="beta: expected 0 to 1"):
            balancing.gradvac(matrix, draw_order(3, 1), torch.zeros(3, 3), bad)
    with pytest.raises(ValueError, match=r"order: expected \[3, 3\], got \[3\]"):
        balancing.gradvac(matrix, torch.arange(3), torch.zeros(3, 3))
