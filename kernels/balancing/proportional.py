"""Weights in proportion to sizes, such as those of the data sets."""

import math

import torch
from torch import Tensor

from ..registration.validation import may_look
from .gram_matrix import check_gram, nan_unless_finite


@nan_unless_finite
def proportional(gram: Tensor, sizes: Tensor) -> Tensor:
    """Weights in proportion to sizes, of the data sets, say; they add up to 1.

    Args:
        gram: ``[K, K]``, floating point.
        sizes: ``[K]``, any dtype, not negative, and not all 0.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above, as far as the values of ``sizes`` are on a CPU.
    """
    check_gram(gram, sizes=(sizes, 1))
    if may_look(sizes) and not (min(values := sizes.tolist()) >= 0 and 0 < sum(values) < math.inf):
        raise ValueError(f"sizes: expected finite numbers of at least 0, not all 0, got {values}")
    # float16 holds no more than 65,504 examples.
    sizes = sizes.to(gram.device, torch.promote_types(gram.dtype, torch.float32))
    return (sizes / sizes.sum()).to(gram.dtype)
