"""Aligned-MTL: the gradients' singular values are made equal."""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from .gram_matrix import in_dtype, left_times, nan_unless_finite, preferences, rounding, times
from .solvers import eigen

ScaleMode = Literal["min", "median", "rmse"]


@nan_unless_finite
def aligned_mtl(
    gram: Tensor, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min"
) -> Tensor:
    """Aligned-MTL: the weighted sum after the matrix's singular values are all made equal.

    Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023,
    Algorithm 1.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]`` weights of that sum, any dtype; None: the mean, ``1 / K`` each.
        scale_mode: which singular value all are made equal to: the ``"min"``, the ``"median"``
            (the lower one of two), or the root mean square, ``"rmse"``.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    if scale_mode not in get_args(ScaleMode):
        raise ValueError(f"scale_mode: expected min, median or rmse, got {scale_mode!r}")
    wanted = preferences(gram, pref_vector)
    values, counts, vectors = eigen(gram.double(), rounding(gram))
    scale = _SCALES[scale_mode](torch.where(counts, values, torch.inf), counts.sum(-1))
    balance = torch.where(counts, (scale[..., None] / values).sqrt(), 0.0)
    coordinates = vectors.mean(-2) if pref_vector is None else left_times(wanted, vectors)
    return in_dtype(times(vectors, balance * coordinates), gram.dtype)


def _median(values: Tensor, rank: Tensor) -> Tensor:
    middle = (rank - 1).clamp(min=0) // 2
    return values.sort().values.gather(-1, middle[..., None])[..., 0]


def _mean_of_finite(values: Tensor, rank: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0).sum(-1) / rank.clamp(min=1)


_SCALES: Mapping[ScaleMode, Callable[[Tensor, Tensor], Tensor]] = {
    "min": lambda values, _rank: values.amin(-1),
    "median": _median,
    "rmse": _mean_of_finite,
}
"""From the eigenvalues that count, infinite elsewhere, and their number to Aligned-MTL's scale."""
