"""From the Gram matrix of the task gradients to the weights of their sum.

Every method here is a function of ``G = J J^T [K, K]`` and of the random order of this step; the
update is always ``sum_k c_k g_k``.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ..rooms import kernels

Method = Callable[[Tensor, Tensor], Tensor]
"""``(gram [K, K] fp32, order [K, K]) -> weights [K] fp32``, on the Gram matrix's device."""


def _sum(gram: Tensor, _order: Tensor) -> Tensor:
    """The gradient of the summed losses: plain multitask training."""
    return torch.ones_like(gram[0])


def _mean(gram: Tensor, _order: Tensor) -> Tensor:
    """The gradient of the mean loss."""
    return torch.full_like(gram[0], 1 / gram.shape[0])


def _pcgrad(gram: Tensor, order: Tensor) -> Tensor:
    """PCGrad, summed as in Algorithm 1 of Yu et al. (2020)."""
    return kernels.pcgrad_weights(gram, order, reduction="sum")


METHODS: Mapping[str, Method] = MappingProxyType({"sum": _sum, "mean": _mean, "pcgrad": _pcgrad})
"""By the name that a recipe's ``balance`` gives."""
