"""IMTL-L: learned factors that bring all losses to the same scale."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import LARGEST
from .learned import LIMIT, adam
from .losses import exp_in_dtype, read_losses, weights_of
from .states import Learned, Step, in_float64, next_state, read_state


def imtl_l(
    gram: Tensor, losses: Tensor, state: Learned | None = None, lr: float = 0.025
) -> Step[Learned]:
    """IMTL-L: each loss times a factor that is learned so that all products come to 1.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.2: the total loss is
    ``sum_k exp(s_k) l_k - s_k``, ``s`` 0 at first.  The weights are ``exp(s_k)``, its derivatives
    by the losses; after them ``s`` takes a step of Adam at a rate of its own, as in :func:`uw`,
    which is this method but for a factor of 2 and the sign of ``s``.

    A loss that stays at 0 or is negative has no optimum: its weight grows with every step, until
    ``s`` ends at 80.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        losses: ``[K]``, of any sign.
        state: of the step before; None at first.
        lr: of Adam, which moves ``s`` by about as much in a step; from 0 to the largest float32.

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
    weights = exp_in_dtype(values, torch.ones_like(own.present), gram.dtype)
    new = adam(state, values.exp() * own.values - 1, lr)
    new = new._replace(values=new.values.clamp(-LIMIT, LIMIT))
    weights = weights_of("imtl_l", weights, gram, losses, own.known)
    return Step(weights, next_state(new, state, own.known))
