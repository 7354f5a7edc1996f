"""GradNorm: weights learnt from the gradients' norms and the training rates."""

import torch
from torch import Tensor

from ..registration.validation import check_number
from .gram_matrix import LARGEST, check_gram, diagonal, nan_unless_finite


@nan_unless_finite
def gradnorm(
    gram: Tensor, weights: Tensor, loss_ratios: Tensor, alpha: float = 1.5, lr: float = 0.025
) -> Tensor:
    """GradNorm: one step of the weights towards gradients whose norms follow the training rates.

    Chen et al., "GradNorm", ICML 2018, Algorithm 1.  The norms are taken relative to their mean,
    so that the step does not depend on the gradients' scale.

    Args:
        gram: ``[K, K]`` of the unweighted gradients, floating point.
        weights: ``[K]`` present weights, adding up to K; ones at first.
        loss_ratios: ``[K]`` present over initial losses, not negative; all 0 count as equal.
        alpha: strength of the pull towards equal rates; finite and not negative.
        lr: step of the weights, from 0 to the largest float32.

    Returns:
        ``[K]`` new weights in the dtype of ``weights``, not negative, adding up to K; the present
        ones where all would be 0.  All are NaN where the diagonal of ``gram`` or a loss ratio is
        not finite, or a ratio is negative; keep the present ones then.

    Raises:
        ValueError: a shape, dtype or number is not as above.
    """
    check_gram(gram, weights=(weights, 1), loss_ratios=(loss_ratios, 1))
    check_number("alpha", alpha)
    check_number("lr", lr, LARGEST)
    norms = diagonal(gram).double().sqrt()
    present, ratios = weights.double(), loss_ratios.double()
    weighted = present * norms
    average, mean_ratio = weighted.mean(-1, keepdim=True), ratios.mean(-1, keepdim=True)
    rates = torch.where(mean_ratio == 0, 1.0, ratios / mean_ratio)
    wanted = torch.where(average > 0, average * rates**alpha, 0.0)
    slope = norms * (weighted - wanted).sign() / torch.where(average > 0, average, 1.0)
    new = (present - lr * slope).clamp(min=0)
    new = torch.where(new.sum(-1, keepdim=True) == 0, present, new)
    known = ((ratios >= 0) & ratios.isfinite()).all(-1, keepdim=True)
    new = torch.where(known, new, torch.nan)
    return (new * (gram.shape[-1] / new.sum(-1, keepdim=True))).to(weights.dtype)
