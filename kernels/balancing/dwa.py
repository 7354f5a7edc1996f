"""Dynamic weight average: weights by how fast the losses fall."""

import torch
from torch import Tensor

from ..registration.validation import check_positive
from .losses import log_softmax, read_losses, weights_of
from .states import Step, WindowAverages, in_float64, next_state, read_state


def dwa(
    gram: Tensor,
    losses: Tensor,
    state: WindowAverages | None = None,
    temperature: float = 2.0,
    window: int = 100,
) -> Step[WindowAverages]:
    """Dynamic weight average: the more a loss has fallen of late, the less it counts.

    Liu, Johns, Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7: the
    weights are ``K softmax(r / T)``, ``r_k`` the mean loss of the last whole window of steps over
    that of the window before.  The paper's windows are epochs; with few epochs, as in fine-tuning,
    most weights would be 1.  All are 1 in the first two windows.

    ``r_k`` is 1 where the earlier mean is 0, and says how fast a loss falls only if its sign stays.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        losses: ``[K]``.
        state: of the step before; None at first.
        temperature: T, above 0; a larger one makes the weights more alike.
        window: steps, from 1 on.

    Returns:
        The weights, which add up to K, and the next state.  All weights are NaN, and the state is
        the present one, where the diagonal of ``gram`` or a loss is not finite.

    Raises:
        TypeError: ``state`` is none.
        ValueError: a shape, dtype or number is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=False)
    check_positive("temperature", temperature)
    if window < 1:
        raise ValueError(f"window: expected at least 1 step, got {window}")
    num_tasks = gram.shape[-1]
    state = read_state(gram, state, WindowAverages)
    means = in_float64(state)
    falls = torch.where(means.before == 0, 1.0, means.last / means.before)
    everywhere = torch.ones_like(falls, dtype=torch.bool)
    weights = num_tasks * log_softmax(falls, everywhere, temperature).exp()
    weights = torch.where(means.windows < 2, 1.0, weights).expand(own.values.shape)
    weights = weights_of("dwa", weights, gram, losses, own.known)
    return Step(weights, next_state(_with(own.values, means, window), state, own.known))


def _with(losses: Tensor, means: WindowAverages, window: int) -> WindowAverages:
    """Return the means with the losses of one more step."""
    steps = means.steps + 1
    present = means.present + (losses - means.present) / steps
    ends = steps >= window
    return WindowAverages(
        torch.where(ends, 0.0, present),
        torch.where(ends, present, means.last),
        torch.where(ends, means.last, means.before),
        torch.where(ends, 0.0, steps),
        means.windows + ends,
    )
