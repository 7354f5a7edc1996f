"""The update of LAMB on flat parameters: each tensor's step is as long as the tensor, times lr.

    u = m^ / (sqrt(v^) + eps) + decay * x        m^, v^: bias-corrected moments of Adam
    x <- x - lr * |x| / |u| * u                  norms by tensor; factor 1 where one of them is 0

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
Algorithm 2, with the identity for phi.  :func:`combine_adamw_` with a learning rate of 0 brings the
moments up to date.  All norms come from one pass of :func:`gram` and stay on the device.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .registration.validation import check_data, check_rates
from .surgery.surgery import gram


def _sizes(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy the sizes of the tensors to the device."""
    return torch.tensor(offsets, device=device).diff()


_cached_sizes = lru_cache(maxsize=8)(_sizes)


def lamb_update_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    offsets: Sequence[int],
    low_precision: Tensor | None = None,
    *,
    lr: Tensor | float,
    step: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    decayed: int | None = None,
    skip: Tensor | None = None,
) -> None:
    """Move the weights by their moments, tensor by tensor.

    Args:
        master: ``[P]`` float32 or float64 weights, updated in place.
        exp_avg: ``[P]`` first moment, of this step already.
        exp_avg_sq: ``[P]`` second moment, likewise.
        offsets: S + 1 ascending numbers; tensor s is ``offsets[s]:offsets[s + 1]``, all of P.
        low_precision: ``[P]`` copy of the weights in another dtype, written too.
        lr: learning rate; a number is finite and not negative, as eps and weight_decay are; or
            ``[S]``, of each tensor.
        step: 0-dim number of this step, the first being 1.
        betas: decay rates of the moments, from 0 to less than 1.
        eps: added to the root of the second moment.
        weight_decay: factor on the weights in u.
        decayed: so many columns decay, from the first; None: all.
        skip: 0-dim bool; where true, nothing changes.

    Raises:
        ValueError: offsets do not cover the weights, a number is not as above, or a storage was
            freed.
    """
    check_data(master=master, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    check_data(low_precision=low_precision, lr=lr, step=step, skip=skip)
    check_rates(betas, lr=lr, eps=eps, weight_decay=weight_decay)
    if offsets[0] != 0 or offsets[-1] != len(master):
        raise ValueError(
            f"offsets: expected from 0 to {len(master)}, got from {offsets[0]} to {offsets[-1]}"
        )
    step = step.clamp(min=1)  # 0 where the very first step is skipped
    root = exp_avg_sq.sqrt().div_((1 - betas[1] ** step.double()).sqrt().to(master)).add_(eps)
    update = exp_avg.div((1 - betas[0] ** step.double()).to(master)).div_(root)
    update[:decayed].add_(master[:decayed], alpha=weight_decay)
    weight_norm, update_norm = (
        gram(vector[None], offsets).flatten().sqrt() for vector in (master, update)
    )
    ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
    rate = ratio * lr
    if skip is not None:
        rate = rate.masked_fill(skip, 0)
    # A graph holds them as a constant; torch.compile warns of what caches.
    sizes_of = _sizes if torch.compiler.is_compiling() else _cached_sizes
    sizes = sizes_of(tuple(offsets), master.device)
    master.addcmul_(torch.repeat_interleave(rate, sizes, output_size=len(master)), update, value=-1)
    if low_precision is not None:
        low_precision.copy_(master)
