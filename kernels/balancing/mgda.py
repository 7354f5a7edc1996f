"""MGDA: the shortest convex combination of the gradients."""

from torch import Tensor

from .gram_matrix import nan_unless_finite, scaled
from .solvers import solve_mgda


@nan_unless_finite
def mgda(gram: Tensor) -> Tensor:
    """MGDA: the shortest convex combination of the gradients.

    Désidéri, "Multiple-gradient descent algorithm", Comptes Rendus Mathématique 2012.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    return solve_mgda(scaled(gram)).to(gram.dtype)
