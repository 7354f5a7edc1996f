"""The toy problem of CAGrad, Nash-MTL and FAMO: two losses in the plane, one a tenth as large.

Two of the papers' five starting points, those whose way is short.  The Pareto set is the line of
y = -8 from x = -7 to 7.
"""

import pytest
import torch
from torch import Tensor

from kernels import balancing
from kernels.balancing.states import Step

SCALE = 0.1
"""Factor on the first loss."""
LOWEST = torch.tensor([-21.0 * SCALE, -21.0])
"""Below both losses, as FAMO's code has it."""
STARTS = [(0.0, 0.0), (-7.5, -0.5)]


def losses_at(point: Tensor) -> Tensor:
    """Two valleys above the axis of x, two bowls below it."""
    x, y = point
    above, below = torch.tanh(y / 2).clamp(min=0), torch.tanh(-y / 2).clamp(min=0)
    ridges = torch.stack([(-x - 7) / 2 + torch.tanh(y), (3 - x) / 2 - torch.tanh(y) + 2])
    valleys = ridges.abs().clamp(min=5e-6).log() + 6
    bowls = (torch.stack([x - 7, x + 7]).square() + (y + 8).square() / 10) / 10 - 20
    return (valleys * above + bowls * below) * torch.tensor([SCALE, 1.0])


def descend(method: str, start: tuple[float, float], steps: int = 600) -> tuple[float, float]:
    """Where Adam ends with the weights of a method."""
    weigh = {
        "sum": lambda gram, *_: Step(balancing.sum(gram), None),
        "famo": lambda *given: balancing.famo(*given, gamma=0.0),
        "stch": lambda *given: balancing.stch(*given, mu=0.1, warmup=1),
    }[method]
    point, state = torch.tensor(start, dtype=torch.float64, requires_grad=True), None
    optimizer = torch.optim.Adam([point], lr=0.02)
    for _ in range(steps):
        losses = losses_at(point) - LOWEST
        rows = torch.stack([torch.autograd.grad(x, point, retain_graph=True)[0] for x in losses])
        weights, state = weigh(rows @ rows.T, losses.detach(), state)
        point.grad = weights @ rows
        optimizer.step()
    x, y = point.tolist()
    return x, y


@pytest.mark.parametrize("start", STARTS)
def test_the_sum_serves_the_larger_loss(start: tuple[float, float]) -> None:
    x, y = descend("sum", start)
    assert -7 < x < -5
    assert y < -4


@pytest.mark.parametrize("method", ["famo", "stch"])
@pytest.mark.parametrize("start", STARTS)
def test_balanced_losses_lead_to_the_middle_of_the_pareto_set(
    method: str, start: tuple[float, float]
) -> None:
    x, y = descend(method, start)
    assert abs(x) < 2
    assert y < -4
