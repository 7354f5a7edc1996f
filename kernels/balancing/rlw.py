"""Random loss weighting: weights that are drawn anew in every step."""

import math

import torch
from torch import Tensor

from ..philox import WORD, philox_words
from ..registration.validation import check_data
from .gram_matrix import check_gram, nan_unless_finite


@nan_unless_finite
def rlw(gram: Tensor, seed: Tensor | int, step: Tensor | int = 0) -> Tensor:
    """Random loss weighting: the softmax of independent standard normal numbers.

    Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning", TMLR 2022, equation 4 with the normal distribution.

    The numbers are a function of seed and step alone: every rank that knows them draws the same,
    and a CUDA graph replays with whatever the two tensors contain then.

    Args:
        gram: ``[K, K]``, floating point; no weight depends on it.
        seed: an int or a 0-dim int64 tensor on the device of ``gram``.
        step: likewise; other weights for each.

    Returns:
        ``[K]`` weights in the dtype of ``gram``, above 0, that add up to 1; all G groups have the
        same.

    Raises:
        ValueError: an argument is not as above.
    """
    check_gram(gram)
    seed, step = (_counter(name, x, gram) for name, x in (("seed", seed), ("step", step)))
    weights = standard_normal(gram.shape[-1], seed, step).softmax(-1)
    return weights.to(gram.dtype).expand(gram.shape[:-1])


def standard_normal(count: int, seed: Tensor, step: Tensor) -> Tensor:
    """Draw ``[count]`` normal numbers in float64 by the Box-Muller transform.

    Number k is made of the first two words at the counter (k, 2^32 - 1, step), at which no order of
    :func:`.draw_order` nor dropout mask is drawn.
    """
    number = torch.arange(count, device=seed.device)
    counter = (number, WORD, step & WORD, (step >> 32) & WORD)
    first, second, _, _ = (
        philox_words([number * 0 + word for word in counter], seed).double().unbind(-1)
    )
    # From above 0 to 1, so that the logarithm is finite.
    radius = (-2 * ((first + 1) / 2**32).log()).sqrt()
    return radius * (second * (2 * math.pi / 2**32)).cos()


def _counter(name: str, value: Tensor | int, gram: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        check_data(**{name: value})
        if value.dim() or value.dtype != torch.int64:
            raise ValueError(
                f"{name}: expected a 0-dim int64 tensor, got {list(value.shape)} {value.dtype}"
            )
        return value
    return torch.full((), value, dtype=torch.int64, device=gram.device)
