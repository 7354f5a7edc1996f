"""ConFIG: chosen cosines to all gradients."""

import torch
from torch import Tensor

from .gram_matrix import (
    diagonal,
    directions,
    dot,
    in_dtype,
    left_times,
    nan_unless_finite,
    preferences,
    rounding,
)
from .solvers import solve_least_squares


@nan_unless_finite
def config(gram: Tensor, pref_vector: Tensor | None = None) -> Tensor:
    """ConFIG: the direction with chosen cosines to all gradients, as long as they reach along it.

    Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks", ICLR 2025, equation 2.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]``, any dtype: the cosines are in proportion to it; None: equal.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    cosines, inverse_norms = directions(gram)
    wanted = torch.where(inverse_norms > 0, preferences(gram, pref_vector, mean=False), 0.0)
    units = solve_least_squares(cosines, wanted, rounding(gram))
    norm_squared = dot(left_times(units, cosines), units)
    reach = dot(left_times(diagonal(gram).double().sqrt(), cosines), units)
    exists = norm_squared > 0
    scale = torch.where(exists, reach / torch.where(exists, norm_squared, 1.0), 0.0)
    return in_dtype(scale[..., None] * inverse_norms * units, gram.dtype)
