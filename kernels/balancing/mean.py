"""The mean of the gradients."""

import torch
from torch import Tensor

from .gram_matrix import check_gram, nan_unless_finite


@nan_unless_finite
def mean(gram: Tensor) -> Tensor:
    """The mean of the gradients.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    check_gram(gram)
    return torch.full_like(gram[..., 0, :], 1 / gram.shape[-1])
