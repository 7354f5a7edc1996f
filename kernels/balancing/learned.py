"""Variables that a balancing method learns beside the model, each task one, by Adam."""

import math

import torch
from torch import Tensor

from .states import Learned, in_float64

_BETAS, _EPS = (0.9, 0.999), 1e-8
_STEEPEST = 1e18
"""A steeper slope counts as this one, whose square float32 can hold."""
LIMIT = 80.0
"""Bound of learned logarithms: float32 holds ``exp(80)``, but not ``exp(89)``."""


def adam(state: Learned, slopes: Tensor, lr: float, weight_decay: float = 0.0) -> Learned:
    """Take a step of torch's Adam: the decay is part of the slope.

    Args:
        state: the present variables.
        slopes: ``[..., K]`` of the loss at them.
        lr: largest step, or nearly.
        weight_decay: multiplies the variables.

    Returns:
        The next ones, in float64.
    """
    values, means, squares, steps = in_float64(state)
    slopes = (slopes + weight_decay * values).clamp(-_STEEPEST, _STEEPEST)
    steps = steps + 1
    means = torch.lerp(means, slopes, 1 - _BETAS[0])
    squares = torch.lerp(squares, slopes.square(), 1 - _BETAS[1])
    mean, square = (
        moment / -torch.expm1(steps * math.log(beta))
        for moment, beta in zip((means, squares), _BETAS, strict=True)
    )
    return Learned(values - lr * mean / (square.sqrt() + _EPS), means, squares, steps)
