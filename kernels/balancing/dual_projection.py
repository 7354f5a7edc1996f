"""DualProj: the weighted sum of the gradients, projected onto their dual cone."""

from torch import Tensor

from .gram_matrix import in_dtype, nan_unless_finite, preferences, scaled
from .solvers import project_onto_dual_cone


@nan_unless_finite
def dual_projection(gram: Tensor, pref_vector: Tensor | None = None) -> Tensor:
    """DualProj: the weighted sum of the gradients projected onto the dual cone of all of them.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, equation 11.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]`` weights of that sum, any dtype; None: the mean, ``1 / K`` each.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    wanted = preferences(gram, pref_vector)
    projected = project_onto_dual_cone(scaled(gram), wanted[..., None, :])
    return in_dtype(projected[..., 0, :], gram.dtype)
