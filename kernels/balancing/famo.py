"""FAMO: weights under which the losses fall at the same rate, learned from the losses alone."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import LARGEST
from .learned import adam
from .losses import exp_in_dtype, log_softmax, read_losses, weights_of
from .states import Famo, Learned, Step, in_float64, next_state, read_state


def famo(
    gram: Tensor,
    losses: Tensor,
    state: Famo | None = None,
    lr: float = 0.025,
    gamma: float = 1e-3,
) -> Step[Famo]:
    """FAMO: weights under which the losses' logarithms fall equally, learned from the losses alone.

    Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, Algorithm 1: with logits
    w and ``z = softmax(w)`` the weights are ``z_k / l_k`` over their sum.  Then w takes a step of
    Adam against ``sum_k z_k d_k``, ``d_k`` the fall of ``log l_k`` in the model's step.

    The paper computes the losses of the same examples again for it after the model's step.  Here
    ``d_k`` is the difference from the losses of the step before, of other examples, so that no
    second forward pass is needed; what two batches differ by counts in one step and against it in
    the next.

    A loss of 0 is left out: its weight is 0, and it counts as not falling, in this step and the
    next.  Of losses that end at a bound other than 0, give their distances from it.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        losses: ``[K]``, not negative.
        state: of the step before; None at first.
        lr: of Adam, from 0 to the largest float32.
        gamma: Adam's decay of the logits, likewise; the paper's is 0.001, its code's 0.00001.

    Returns:
        The weights, which add up to 1, and the next state.  All weights are NaN, and the state is
        the present one, where the diagonal of ``gram`` or a loss is not finite, or a loss is
        negative.

    Raises:
        TypeError: ``state`` is none.
        ValueError: a shape, dtype or number is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=True)
    check_number("lr", lr, LARGEST)
    check_number("gamma", gamma, LARGEST)
    state = read_state(gram, state, Famo)
    now = in_float64(state)
    learned = Learned(*now[:4])
    were = now.losses > 0
    falls = torch.where(were, now.losses, 1.0).log() - own.logarithms
    falls = torch.where(were & own.present, falls, 0.0)
    shares = now.logits.softmax(-1)
    slopes = shares * (falls - (shares * falls).sum(-1, keepdim=True))
    new = adam(learned, slopes, lr, gamma)
    begun = were.any(-1, keepdim=True)
    new = Learned(*(torch.where(begun, a, b) for a, b in zip(new, learned, strict=True)))
    new = new._replace(values=new.values.clamp(-LARGEST, LARGEST))
    logarithms = log_softmax(new.values - own.logarithms, own.present)
    weights = exp_in_dtype(logarithms, own.present, gram.dtype)
    weights = weights_of("famo", weights, gram, losses, own.known)
    return Step(weights, next_state(Famo(*new, own.values), state, own.known))
