"""IMTL-G: equal projections onto all gradients."""

import torch
from torch import Tensor

from .gram_matrix import directions, in_dtype, nan_unless_finite, rounding
from .solvers import solve_least_squares


@nan_unless_finite
def imtl_g(gram: Tensor) -> Tensor:
    """IMTL-G: the combination with equal projections onto all gradients; weights add up to 1.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.1.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    return in_dtype(equal_projections(gram), gram.dtype)


def equal_projections(gram: Tensor, scales: Tensor | None = None) -> Tensor:
    """``[..., K]`` in float64: weights of equal projections, which times scales add up to 1.

    Args:
        gram: ``[..., K, K]``.
        scales: ``[..., K]``, above 0; ones when None.
    """
    cosines, inverse_norms = directions(gram)
    ones = (inverse_norms > 0).double()
    weights = inverse_norms * solve_least_squares(cosines, ones, rounding(gram))
    shares = weights if scales is None else weights * scales
    total = shares.sum(-1, keepdim=True)
    exists = total.abs() > 1e-12 * shares.abs().sum(-1, keepdim=True)
    return torch.where(exists, weights / torch.where(exists, total, 1.0), 0.0)
