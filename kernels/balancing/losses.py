"""Losses of balancing methods: checks, which of them count, weights by their logarithms.

As for Gram matrices (:mod:`.gram_matrix`), all is float64 on the device of G and nothing waits for
it.  Losses are ``[K]``, one for all groups, or ``[G, K]``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..registration.differentiation import refuse_derivative_by
from .gram_matrix import check_gram, is_finite


class TaskLosses(NamedTuple):
    """Losses in float64, without their graphs.

    Attributes:
        values: ``[..., K]``.
        present: ``[..., K]``, whether a loss is above 0, so that it has a logarithm.
        known: ``[..., 1]``, whether there are weights: the diagonal of G and all losses are finite
            and, where the method takes logarithms, not negative.
    """

    values: Tensor
    present: Tensor
    known: Tensor

    @property
    def logarithms(self) -> Tensor:
        """``[..., K]``; 0 where there is none."""
        return torch.where(self.present, self.values, 1.0).log()


def read_losses(gram: Tensor, losses: Tensor, *, logarithmic: bool) -> TaskLosses:
    """Check a Gram matrix and losses.

    Args:
        gram: ``[..., K, K]``, floating point.
        losses: ``[K]`` or ``[..., K]``, any dtype, on the device of ``gram``.
        logarithmic: whether the method takes their logarithms.

    Raises:
        ValueError: an argument is not as above.
    """
    check_gram(gram, losses=(losses, 1))
    values = losses.detach().double().expand(gram.shape[:-1])
    usable = (values >= 0) & values.isfinite() if logarithmic else values.isfinite()
    known = is_finite(gram.detach())[..., None] & usable.all(-1, keepdim=True)
    return TaskLosses(values, values > 0, known)


def exp_in_dtype(logarithms: Tensor, present: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights by their logarithms, 0 where not ``present``.

    Where the dtype cannot hold the largest, all are made smaller alike.
    """
    logarithms = torch.where(present, logarithms, -torch.inf)
    most = math.log(torch.finfo(dtype).max) - 1
    excess = (logarithms.amax(-1, keepdim=True) - most).clamp(min=0)
    return (logarithms - excess).exp()


def log_softmax(values: Tensor, present: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the logarithm of ``softmax(values / temperature)`` of those present.

    A temperature may be as small as a float can be.  Without any present all are NaN.
    """
    values = torch.where(present, values, -torch.inf)
    return ((values - values.amax(-1, keepdim=True)) / temperature).log_softmax(-1)


def weights_of(method: str, weights: Tensor, gram: Tensor, losses: Tensor, known: Tensor) -> Tensor:
    """Return weights in the dtype of G, NaN where none are ``known``; they have no derivative."""
    weights = torch.where(known, weights, torch.nan).to(gram.dtype)
    return refuse_derivative_by(method, "detached arguments", weights, gram, losses)
