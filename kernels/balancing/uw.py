"""Uncertainty weighting: weights by learned variances of the losses."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import LARGEST
from .learned import LIMIT, adam
from .losses import exp_in_dtype, read_losses, weights_of
from .states import Learned, Step, in_float64, next_state, read_state


def uw(
    gram: Tensor, losses: Tensor, state: Learned | None = None, lr: float = 0.025
) -> Step[Learned]:
    """Uncertainty weighting: a loss counts by its variance, which is learned with the model.

    Kendall, Gal, Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
    and Semantics", CVPR 2018, equation 7 in the form of its implementations: the total loss is
    ``sum_k exp(-s_k) l_k / 2 + s_k / 2`` with ``s_k`` the logarithm of the variance, 0 at first.
    The weights are its derivatives by the losses, ``exp(-s_k) / 2``; after them ``s`` takes a step
    of Adam, as with the model's optimizer in the papers' code, at a rate of its own: at that of a
    pretrained encoder the variances would not leave 1.  Their optimum is ``exp(s_k) = l_k``.

    A loss that stays at 0 or is negative has no optimum: its weight grows with every step, until
    ``s`` ends at -80.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        losses: ``[K]``, of any sign.
        state: of the step before; None at first.
        lr: of Adam, which moves ``s`` by about as much in a step; from 0 to the largest float32.
            0.025 is the published rate of such variables in the code of Nash-MTL and FAMO.

    Returns:
        The weights and the next state.  All weights are NaN, and the state is the present one,
        where the diagonal of ``gram`` or a loss is not finite.

    Raises:
        TypeError: ``state`` is none.
        ValueError: a shape, dtype or number is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=False)
    check_number("lr", lr, LARGEST)
    state = read_state(gram, state, Learned)
    values = in_float64(state).values.expand(gram.shape[:-1])
    everywhere = torch.ones_like(own.present)
    weights = exp_in_dtype(-values, everywhere, gram.dtype) / 2
    new = adam(state, (1 - (-values).exp() * own.values) / 2, lr)
    new = new._replace(values=new.values.clamp(-LIMIT, LIMIT))
    weights = weights_of("uw", weights, gram, losses, own.known)
    return Step(weights, next_state(new, state, own.known))
