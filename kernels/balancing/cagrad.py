"""CAGrad: the best worst-case direction near the mean gradient."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import (
    LARGEST,
    diagonal,
    dot,
    in_dtype,
    left_times,
    nan_unless_finite,
    preferences,
    rounding,
    scaled,
)
from .solvers import project_onto_dual_cone, solve_cagrad, solve_mgda


@nan_unless_finite
def cagrad(gram: Tensor, c: float = 0.5) -> Tensor:
    """CAGrad: the best worst-case direction within ``c |g0|`` of the mean gradient ``g0``.

    Liu et al., "Conflict-Averse Gradient Descent", NeurIPS 2021, Algorithm 1.

    Args:
        gram: ``[K, K]``, floating point.
        c: radius in units of ``|g0|``: 0 is the mean itself; from 1 on no task is worsened.  At
            most the largest float32.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("c", c, LARGEST)
    matrix = scaled(gram)
    weights = solve_cagrad(matrix, c)
    if c >= 1:
        # Where the gradients' hull holds zero, the best that no task is worsened by is the
        # projection of g0; going on until c |g0| is reached would follow rounding errors.
        mean_projected = project_onto_dual_cone(matrix, preferences(gram, None)[..., None, :])
        holds_zero = _hull_holds_zero(matrix, rounding(gram))[..., None]
        weights = torch.where(holds_zero, mean_projected[..., 0, :], weights)
    return in_dtype(weights, gram.dtype)


def _hull_holds_zero(matrix: Tensor, relative: float) -> Tensor:
    """Whether the shortest convex combination of the gradients is zero but for rounding."""
    shortest = solve_mgda(matrix)
    longest = dot(shortest, diagonal(matrix).sqrt())  # had the gradients one direction
    return dot(left_times(shortest, matrix), shortest) <= 4 * relative * longest**2
