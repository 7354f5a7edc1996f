"""Activations in float64 without cancellation, where torch's own are zero too early."""

import torch
from torch import Tensor

from kernels.gated_activation.gated_activation import GELU, GELU_TANH


def tail_of(a: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    """``act(a)`` of float64 numbers, and the relative error that float32 may make of it.

    Four units in the last place; where tanh is in it also that of four roundings of its argument,
    which is an exponent.
    """
    few = torch.full_like(a, 4 * torch.finfo(torch.float32).eps)
    if activation == GELU:
        return a / 2 * torch.special.erfc(-a / 2**0.5), few
    if activation == GELU_TANH:
        twice = 2 * (2 / torch.pi) ** 0.5 * (a + 0.044715 * a**3)
        return a * twice.sigmoid(), few + 4 * 2**-24 * twice.abs().clamp(max=110)
    return a * a.sigmoid(), few
