"""FairGrad: alpha-fair weights, which Nash-MTL's are for alpha = 1."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import diagonal, in_dtype, nan_unless_finite, scaled
from .mean import mean
from .solvers import solve_fairgrad


@nan_unless_finite
def fairgrad(gram: Tensor, alpha: float = 1.0) -> Tensor:
    """FairGrad: alpha-fair weights, ``G c = c^(-1 / alpha)``.

    Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation 6, for G
    divided by its Frobenius norm.

    Args:
        gram: ``[K, K]``, floating point.
        alpha: 0 is the mean, 1 is Nash-MTL, larger values favour the task that gains least; finite.
            Between 0 and 1e-8 it is taken for 1e-8.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("alpha", alpha)
    return in_dtype(fair_weights(gram, alpha)[0], gram.dtype) if alpha > 0 else mean(gram)


def fair_weights(gram: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """FairGrad's weights in float64, and what G was divided by."""
    matrix = scaled(gram)
    norm = torch.linalg.vector_norm(matrix, dim=(-2, -1))
    weights = solve_fairgrad(matrix / torch.where(norm > 0, norm, 1.0)[..., None, None], alpha)
    return weights, norm * diagonal(gram).double().mean(-1)
