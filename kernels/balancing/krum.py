"""Multi-Krum: the mean of the gradients that lie closest to their neighbours."""

import torch
from torch import Tensor

from .gram_matrix import check_gram, diagonal, nan_unless_finite


@nan_unless_finite
def krum(gram: Tensor, num_byzantine: int = 0, num_selected: int = 1) -> Tensor:
    """Multi-Krum: the mean of the gradients that lie closest to their neighbours.

    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017.

    Args:
        gram: ``[K, K]``, floating point, with K at least ``num_byzantine + 3``.
        num_byzantine: how many gradients may be arbitrary.
        num_selected: how many are averaged.

    Returns:
        ``[K]`` weights in the dtype of ``gram``: ``1 / num_selected`` or 0.

    Raises:
        ValueError: an argument is not as above.
    """
    check_gram(gram)
    count = gram.shape[-1]
    neighbours = count - num_byzantine - 2
    if num_byzantine not in range(count - 2) or num_selected not in range(1, count + 1):
        raise ValueError(
            f"Krum of {count} gradients needs at least num_byzantine + 3 of them, "
            f"num_byzantine from 0 and num_selected from 1 to {count}"
        )
    squares = diagonal(gram).double()
    sums = squares[..., None] + squares[..., None, :]
    distances = (sums - 2 * gram.double()).clamp(min=0).sqrt()
    diagonal(distances).fill_(torch.inf)
    scores = distances.topk(neighbours, largest=False).values.sum(-1)
    selected = scores.topk(num_selected, largest=False).indices
    return torch.zeros_like(gram[..., 0, :]).scatter(-1, selected, 1 / num_selected)
