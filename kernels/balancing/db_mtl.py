"""DB-MTL: gradients of the losses' logarithms, all as long as the longest."""

import torch
from torch import Tensor

from .gram_matrix import diagonal
from .losses import exp_in_dtype, read_losses, weights_of


def db_mtl(gram: Tensor, losses: Tensor) -> Tensor:
    """DB-MTL without its moving average: gradients of ``log l``, all made as long as the longest.

    Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, Algorithm 1 with ``beta = 0``: the
    gradients are those of this step.  With a larger beta the paper averages them over the steps,
    which needs a second buffer as large as all task gradients.

    The gradient of ``log l_k`` is ``g_k / l_k``; with M the largest norm of these, the weight of
    task k is ``M / |g_k|``.  A loss or a gradient of 0 is left out: its weight is 0.

    Args:
        gram: ``[K, K]``, floating point.
        losses: ``[K]``, not negative.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.  All are NaN where the diagonal of ``gram`` or a
        loss is not finite, or a loss is negative.

    Raises:
        ValueError: a shape or dtype is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=True)
    squares = diagonal(gram.detach()).double()
    present = own.present & (squares > 0)
    norms = torch.where(present, squares, 1.0).log() / 2
    longest = torch.where(present, norms - own.logarithms, -torch.inf).amax(-1, keepdim=True)
    weights = exp_in_dtype(longest - norms, present, gram.dtype)
    return weights_of("db_mtl", weights, gram, losses, own.known)
