"""PCGrad: every gradient is projected by those that it conflicts with, in a random order.

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1.

Both operators are C++ on the CPU and, where the extension was built with it, CUDA; the functions
``*_reference`` say in plain torch what they compute.
"""

from typing import Literal

import torch
from torch import Tensor

from ..philox import WORD, philox_words
from ..registration.backend import register_fake
from ..registration.differentiation import refuse_derivative
from ..surgery.surgery import declare_operators
from .gram_matrix import diagonal, is_finite

Reduction = Literal["sum", "mean"]

_ops = torch.ops.superbert


# ---- references: what the operators compute, in plain torch --------------------------------------


def pcgrad_weights_reference(gram: Tensor, order: Tensor, mean: bool, include_self: bool) -> Tensor:
    """``[..., K]``: Algorithm 1 on coefficients, all K projected gradients side by side."""
    num_tasks = gram.shape[-1]
    products = gram.double()
    norms_squared = diagonal(products)
    task = torch.arange(num_tasks, device=gram.device)
    identity = torch.eye(num_tasks, dtype=torch.float64, device=gram.device)
    coefficients = identity.expand(gram.shape)
    for other in order.unbind(1):  # row i is projected by task other[i]
        dot = (coefficients * products[..., other, :]).sum(-1)
        conflict = (dot < 0) & (norms_squared[..., other] > 0)
        if not include_self:
            conflict &= other != task
        step = torch.where(conflict, dot / norms_squared[..., other], 0.0)
        column = other[:, None].expand(*gram.shape[:-1], 1)
        coefficients = coefficients.scatter_add(-1, column, -step[..., None])
    weights = coefficients.mean(-2) if mean else coefficients.sum(-2)
    return torch.where(is_finite(gram)[..., None], weights, torch.nan).to(gram.dtype)


def draw_order_reference(seed: Tensor, step: Tensor, num_tasks: int) -> Tensor:
    """``[K, K]`` int64: row i is a Fisher-Yates permutation from counter (draw / 4, i, step)."""
    row = torch.arange(num_tasks, device=seed.device)
    block = torch.arange((num_tasks + 2) // 4, device=seed.device)
    counter = torch.broadcast_tensors(block, row[:, None], step & WORD, (step >> 32) & WORD)
    words = philox_words(counter, seed).flatten(1)
    order = row.repeat(num_tasks, 1)
    for draw, last in enumerate(range(num_tasks - 1, 0, -1)):
        chosen = (words[:, draw, None] * (last + 1)) >> 32
        at_last = order[:, last].clone()
        order[:, last] = order.gather(1, chosen)[:, 0]
        order.scatter_(1, chosen, at_last[:, None])
    return order


# ---- registration ------------------------------------------------------------------------------

declare_operators({"pcgrad_weights": pcgrad_weights_reference, "draw_order": draw_order_reference})
refuse_derivative("pcgrad_weights", name="pcgrad_weights", instead="gram.detach()")


@register_fake("pcgrad_weights")
def _(gram: Tensor, order: Tensor, mean: bool, include_self: bool) -> Tensor:
    return gram.new_empty(gram.shape[:-1])


@register_fake("draw_order")
def _(seed: Tensor, step: Tensor, num_tasks: int) -> Tensor:
    return seed.new_empty(num_tasks, num_tasks)


# ---- public functions --------------------------------------------------------------------------


def draw_order(num_tasks: int, seed: Tensor | int, step: Tensor | int = 0) -> Tensor:
    """Random projection orders for PCGrad, a pure function of seed and step.

    Every rank that knows the seed draws the same order, and a CUDA graph that holds this call
    replays with whatever the two tensors contain then.

    Args:
        num_tasks: K, from 1 on.
        seed: an int or a 0-dim int64 tensor, whose device the result is on.
        step: likewise; a different order for each.

    Returns:
        ``[K, K]`` int64; row i is a uniformly random permutation of 0 .. K-1.
    """
    if isinstance(seed, int):
        seed = torch.tensor(seed)
    if isinstance(step, int):
        step = torch.full_like(seed, step)
    return _ops.draw_order(seed, step, num_tasks)


def pcgrad_weights(
    gram: Tensor,
    order: Tensor | None = None,
    generator: torch.Generator | None = None,
    reduction: Reduction = "sum",
    include_self: bool = False,
) -> Tensor:
    """PCGrad's weights of the task gradients, solved on the device.

    Args:
        gram: ``[K, K]`` from :func:`gram`, float32 or float64, or ``[G, K, K]`` of G groups that
            are projected separately, each in the same order.
        order: ``[K, K]`` int64; row i is the sequence of tasks that g_i is projected by, each of
            them once, which a CPU checks.  Task i itself is passed over.  Drawn at random when
            None.
        generator: draws the order's seed; torch's default generator of the device when None.
        reduction: ``"sum"`` of the projected gradients as in the paper, or their ``"mean"``.
        include_self: also project g_i by itself where its turn comes, as widely copied code does;
            with the same order this replays that code's update.

    Returns:
        ``[K]`` weights c in the dtype of ``gram``, or ``[G, K]``: the combined gradient is
        ``sum_k c_k g_k``.  All are NaN where the diagonal of ``gram`` is not finite.

    Raises:
        ValueError: if a shape, a dtype or an order is not as above, or the reduction is unknown.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
    if order is None:
        device = gram.device if generator is None else generator.device
        seed = torch.randint(-(2**63), 2**63 - 1, (), generator=generator, device=device)
        order = draw_order(gram.shape[-1], seed).to(gram.device, non_blocking=True)
    return _ops.pcgrad_weights(gram, order, reduction == "mean", include_self)
