"""Geometric loss strategy: the gradient of the losses' geometric mean."""

from torch import Tensor

from .losses import exp_in_dtype, read_losses, weights_of


def gls(gram: Tensor, losses: Tensor) -> Tensor:
    """Geometric loss strategy: the derivatives of the losses' geometric mean.

    Chennupati et al., "MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy for
    Multi-Task Learning", CVPR Workshops 2019, equation 2: the total loss is
    ``(l_1 ... l_K)^(1 / K)``, so that the weight of task k is this mean over ``K l_k``.

    A loss of 0, for which there is no derivative, is left out: its weight is 0, and the mean is
    that of the others.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        losses: ``[K]``, not negative.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.  All are NaN where the diagonal of ``gram`` or a
        loss is not finite, or a loss is negative.

    Raises:
        ValueError: a shape or dtype is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=True)
    logarithms = own.logarithms
    count = own.present.sum(-1, keepdim=True).clamp(min=1).double()
    mean = logarithms.sum(-1, keepdim=True) / count
    weights = exp_in_dtype(mean - count.log() - logarithms, own.present, gram.dtype)
    return weights_of("gls", weights, gram, losses, own.known)
