"""UPGrad: the weighted sum of the gradients' projections onto their dual cone."""

import torch
from torch import Tensor

from .gram_matrix import in_dtype, nan_unless_finite, preferences, scaled
from .solvers import project_onto_dual_cone


@nan_unless_finite
def upgrad(gram: Tensor, pref_vector: Tensor | None = None) -> Tensor:
    """UPGrad: the weighted sum of the gradients, each projected onto the dual cone of all of them.

    Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, section 3.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]`` weights of that sum, any dtype; None: the mean, ``1 / K`` each.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    each = torch.diag_embed(preferences(gram, pref_vector))
    return in_dtype(project_onto_dual_cone(scaled(gram), each).sum(-2), gram.dtype)
