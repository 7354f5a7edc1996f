"""Nash-MTL: the Nash bargaining solution."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .fairgrad import fair_weights
from .gram_matrix import in_dtype, nan_unless_finite


@nan_unless_finite
def nash_mtl(gram: Tensor, max_norm: float | None = None) -> Tensor:
    """Nash-MTL: the Nash bargaining solution, ``G c = 1 / c``.

    Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, equation 2 and Algorithm 1.

    Args:
        gram: ``[K, K]``, floating point.
        max_norm: the combined gradient is limited to this norm; 0: no limit.  Before that its norm
            is ``sqrt(K)`` whatever the gradients' scale.  None: G is divided by its Frobenius norm
            instead, so that the weights do not depend on the gradients' scale.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("max_norm", max_norm)
    weights, scale = fair_weights(gram, alpha=1.0)
    if max_norm is None:
        return in_dtype(weights, gram.dtype)
    weights = weights / torch.where(scale > 0, scale, 1.0).sqrt()[..., None]
    if max_norm > 0:
        square = (weights[..., None, :] @ gram.double() @ weights[..., None])[..., 0]
        norm = square.clamp(min=0).sqrt()
        weights = weights * (max_norm / torch.where(norm > 0, norm, 1.0)).clamp(max=1.0)
    return in_dtype(weights, gram.dtype)
