"""GradVac: gradients are turned towards the cosines that they used to have."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..registration.differentiation import without_derivative
from ..registration.validation import check_order
from .gram_matrix import check_gram, diagonal, directions, in_dtype, is_finite


class GradVacStep(NamedTuple):
    """Result of :func:`gradvac`.

    Attributes:
        weights: ``[K]`` in the dtype of the Gram matrix.
        targets: ``[K, K]`` target cosines for the next step, likewise; the present ones where the
            diagonal of the Gram matrix is not finite.
    """

    weights: Tensor
    targets: Tensor


def gradvac(gram: Tensor, order: Tensor, targets: Tensor, beta: float = 0.5) -> GradVacStep:
    """Gradient vaccine: turn gradients towards the cosines that they used to have.

    Wang et al., "Gradient Vaccine", ICLR 2021, Algorithm 1.

    Args:
        gram: ``[K, K]``, floating point.
        order: ``[K, K]`` int64, as for :func:`pcgrad_weights`.
        targets: ``[K, K]`` running means of the cosines, zeros at first.
        beta: weight of the newest cosine in that mean, from 0 to 1.

    Returns:
        The weights, and the targets of the next step.

    Raises:
        ValueError: an argument is not as above.
        NotImplementedError: when the result is differentiated.
    """
    check_gram(gram, order=(order, 2), targets=(targets, 2))
    num_tasks = gram.shape[-1]
    check_order(order, num_tasks)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, got {beta}")
    gram, targets = without_derivative("gradvac", "gram.detach()", gram, targets)
    cosines, inverse_norms = directions(gram)
    task = torch.arange(num_tasks, device=gram.device)
    present_targets = targets = targets.double().expand(gram.shape)
    is_there = diagonal(cosines) > 0
    # Row i: the modified gradient i in terms of the unit gradients, times its inverse norm.
    rows = torch.eye(num_tasks, dtype=torch.float64, device=gram.device).expand(gram.shape)
    for other in order.unbind(1):
        norm = ((rows @ cosines) * rows).sum(-1).clamp(min=0).sqrt()
        cosine = (rows * cosines[..., other, :]).sum(-1) / torch.where(norm > 0, norm, 1.0)
        target = targets[..., task, other]
        present = (other != task) & is_there & is_there[..., other]
        ours, theirs = (1 - cosine**2).clamp(min=0).sqrt(), (1 - target**2).clamp(min=1e-16).sqrt()
        turn = norm * (target * ours - cosine * theirs) / theirs
        turn = torch.where(present & (cosine < target), turn, 0.0)
        column = other[:, None].expand(*gram.shape[:-1], 1)
        rows = rows.scatter_add(-1, column, turn[..., None])
        newest = torch.where(present, torch.lerp(target, cosine, beta), target)
        targets = targets.scatter(-1, column, newest[..., None])
    norms = diagonal(gram).double().sqrt()
    weights = (norms[..., None] * rows * inverse_norms[..., None, :]).sum(-2)
    finite = is_finite(gram)[..., None]
    weights = torch.where(finite, weights, torch.nan)
    targets = torch.where(finite[..., None], targets, present_targets)
    return GradVacStep(in_dtype(weights, gram.dtype), targets.to(gram.dtype))
