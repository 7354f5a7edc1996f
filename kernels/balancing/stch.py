"""Smooth Tchebycheff scalarization: the gradient of a smooth maximum of the losses."""

import math

import torch
from torch import Tensor

from ..registration.validation import check_positive
from .losses import exp_in_dtype, log_softmax, read_losses, weights_of
from .states import Nadir, Step, in_float64, next_state, read_state


def stch(
    gram: Tensor, losses: Tensor, state: Nadir | None = None, mu: float = 1.0, warmup: int = 100
) -> Step[Nadir]:
    """Smooth Tchebycheff scalarization: the task counts most that is worst off by its own measure.

    Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024, as
    the paper's code has it for multitask learning, of logarithms of the losses: the total loss is
    ``K mu log sum_k exp(log(l_k / z_k) / mu)``, ``z`` the mean losses of a warm-up, in which it is
    ``sum_k log l_k``.  The weights are the derivatives by the losses,
    ``K softmax(log(l / z) / mu)_k / l_k``, and ``1 / l_k`` in the warm-up.  The code's warm-up is
    four epochs, and ``z`` the mean of the fifth; here it is so many steps and their mean.

    A loss of 0 is left out: its weight is 0.  Where all of a warm-up were 0, the task counts as if
    its loss stayed at z.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        losses: ``[K]``, not negative.
        state: of the step before; None at first.
        mu: above 0; the smaller, the closer to the maximum.
        warmup: steps, from 1 on.

    Returns:
        The weights and the next state.  All weights are NaN, and the state is the present one,
        where the diagonal of ``gram`` or a loss is not finite, or a loss is negative.

    Raises:
        TypeError: ``state`` is none.
        ValueError: a shape, dtype or number is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=True)
    check_positive("mu", mu)
    if warmup < 1:
        raise ValueError(f"warmup: expected at least 1 step, got {warmup}")
    num_tasks = gram.shape[-1]
    state = read_state(gram, state, Nadir)
    nadir = in_float64(state)
    is_measured = nadir.losses > 0
    measures = torch.where(is_measured, nadir.losses, 1.0).log()
    rises = torch.where(is_measured, own.logarithms - measures, 0.0)
    shares = math.log(num_tasks) + log_softmax(rises, own.present, mu)
    warms_up = nadir.steps < warmup
    logarithms = torch.where(warms_up, 0.0, shares) - own.logarithms
    weights = exp_in_dtype(logarithms, own.present, gram.dtype)
    weights = weights_of("stch", weights, gram, losses, own.known)
    steps = nadir.steps + 1
    new = Nadir(nadir.losses + (own.values - nadir.losses) / steps, steps)
    return Step(weights, next_state(new, state, own.known & warms_up))
