"""All that a training step must know of its update beside the weights, in one launch.

From the Gram matrices ``[G, K, K]`` of G parameter groups and their weights ``[G, K]``: the norm of
the combined gradient, clipping, the overflow check, and what a report says of all groups together.
In plain torch it is some thirty launches of a few numbers each.

The operator is C++ on the CPU and, where the extension was built with it, CUDA.  Squared norms and
sums over groups are float64, in a fixed order; norm and factor are rounded as
:func:`.update_guard` rounds them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..registration.backend import register_fake
from ..registration.differentiation import refuse_derivative
from .surgery import declare_operators, update_guard

_ops = torch.ops.superbert


class UpdateSummary(NamedTuple):
    """Result of :func:`update_summary`; tensors on the device, without the loss scale.

    Attributes:
        norm: 0-dim, L2 norm of the combined gradient before clipping.
        scale: 0-dim, factor for :func:`.combine_adamw_`: clipping times 1 / loss scale.
        skip: 0-dim bool, whether a task gradient or a loss is not finite.
        skipped: the same as a number, 1 or 0.
        gram: ``[K, K]``, the Gram matrix of all groups together.
        weights: ``[K]``, the mean of the groups' weights by their shares.
    """

    norm: Tensor
    scale: Tensor
    skip: Tensor
    skipped: Tensor
    gram: Tensor
    weights: Tensor


def update_summary_reference(
    gram: Tensor,
    weights: Tensor,
    losses: Tensor,
    shares: Tensor,
    max_norm: float,
    loss_scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """What the operator computes, by :func:`.update_guard`."""
    scale = torch.ones_like(shares[0]) if loss_scale is None else loss_scale
    limit = None if math.isinf(max_norm) else max_norm
    guard = update_guard(gram, weights, max_norm=limit, loss_scale=scale)
    skip = guard.skip | ~torch.isfinite(losses).all()
    of_all = (gram.double().sum(0) / scale.double() ** 2).to(gram.dtype)
    mean = (shares.double() @ weights.double()).to(gram.dtype)
    return guard.norm, guard.scale, skip, skip.to(gram.dtype), of_all, mean


declare_operators({"update_summary": update_summary_reference})
refuse_derivative("update_summary", name="update_summary", instead="gram.detach()")


@register_fake("update_summary")
def _(gram: Tensor, weights: Tensor, *_: object) -> tuple[Tensor, ...]:
    norm, scale, skipped = (gram.new_empty(()) for _ in range(3))
    skip = gram.new_empty((), dtype=torch.bool)
    return norm, scale, skip, skipped, gram.new_empty(gram.shape[1:]), gram.new_empty(gram.shape[1])


def update_summary(
    gram: Tensor,
    weights: Tensor,
    losses: Tensor,
    shares: Tensor,
    *,
    max_norm: float | None = None,
    loss_scale: Tensor | None = None,
) -> UpdateSummary:
    """Norm, clipping, overflow and report of an update, in one launch.

    Args:
        gram: ``[G, K, K]`` Gram matrices of the task gradients by parameter groups, float32 or
            float64, of losses times the loss scale.
        weights: ``[G, K]`` weights of the task gradients, in the dtype of ``gram``, as all others.
        losses: ``[K]``.
        shares: ``[G]``, by which the groups count in the mean of their weights.
        max_norm: clip the combined gradient to this norm; None, or infinite: never.
        loss_scale: 0-dim, what the losses were multiplied by; None: 1.  Its value is not looked at.

    Returns:
        See :class:`UpdateSummary`.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or a storage was freed.
    """
    limit = math.inf if max_norm is None else max_norm
    return UpdateSummary(*_ops.update_summary(gram, weights, losses, shares, limit, loss_scale))
