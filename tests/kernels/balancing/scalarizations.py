"""Total losses as functions of the tasks' losses, and the weights that they mean."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .methods import gradients

GRAM = gradients(4, 7) @ gradients(4, 7).T
"""Of four tasks, in float64; methods of losses take nothing from it but its dtype."""


def derivatives(total: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
    """The derivatives of a total loss by the losses, by autograd."""
    losses = losses.clone().requires_grad_()
    (found,) = torch.autograd.grad(total(losses), losses)
    return found


def steps_of_losses(count: int, num_tasks: int = 4) -> Iterator[Tensor]:
    """``[num_tasks]`` losses above 0 of scales from 0.01 to 10, in float64, for each step."""
    generator = torch.Generator().manual_seed(5)
    scales = torch.logspace(-2, 1, num_tasks, dtype=torch.float64)
    for step in range(count):
        noise = torch.rand(num_tasks, dtype=torch.float64, generator=generator)
        yield scales * (0.5 + noise) * 0.98**step
