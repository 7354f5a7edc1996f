"""Gram matrices of balancing methods: checks, scaling, directions, dtypes, small products.

All is float64 on the matrix's device; nothing waits for it.  A matrix is ``[K, K]``; ``[G, K, K]``
are those of G parameter groups, each a problem of its own.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..registration.validation import check_data, may_look


def check_gram(gram: Tensor, **others: tuple[Tensor, int]) -> None:
    """Refuse a Gram matrix that is not ``[K, K]``, and others whose dimensions are not all K.

    Of G matrices the others may have a first dimension G too.

    Raises:
        ValueError: the message names the argument.
    """
    if gram.dim() not in (2, 3) or not gram.numel() or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram: expected [K, K], got {list(gram.shape)}")
    if not gram.is_floating_point():
        raise ValueError(f"gram: expected floating point, got {gram.dtype}")
    check_data(gram=gram, **{name: tensor for name, (tensor, _) in others.items()})
    for name, (tensor, dims) in others.items():
        expected = [gram.shape[-1]] * dims
        if list(tensor.shape) not in (expected, [*gram.shape[:-2], *expected]):
            raise ValueError(f"{name}: expected {expected}, got {list(tensor.shape)}")


LARGEST = torch.finfo(torch.float32).max
"""Of settings that weights are multiplied by."""

Method = TypeVar("Method", bound=Callable[..., Tensor])


def nan_unless_finite(method: Method) -> Method:
    """Make all weights NaN where the diagonal of the Gram matrix is not finite.

    No weight of a gradient that holds a NaN makes a sum that means anything, and finite weights of
    the others would hide it.
    """

    @functools.wraps(method)
    def run(gram: Tensor, *arguments: Any, **options: Any) -> Tensor:
        weights = method(gram, *arguments, **options)
        return torch.where(is_finite(gram)[..., None], weights, torch.nan)

    return run  # type: ignore[return-value]


def is_finite(gram: Tensor) -> Tensor:
    """Whether all gradients are finite and no longer than their Gram matrix can say: ``[...]``."""
    return diagonal(gram).isfinite().all(-1)


def diagonal(matrix: Tensor) -> Tensor:
    """``[..., K]``, a view."""
    return matrix.diagonal(dim1=-2, dim2=-1)


def times(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector`` of ``[..., K]``."""
    return matrix @ vector if matrix.dim() == 2 else (matrix @ vector[..., None])[..., 0]


def left_times(vector: Tensor, matrix: Tensor) -> Tensor:
    """``vector @ matrix`` of ``[..., K]``."""
    return vector @ matrix if matrix.dim() == 2 else (vector[..., None, :] @ matrix)[..., 0, :]


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of ``[..., K]``: ``[...]``."""
    return a @ b if a.dim() == 1 else (a * b).sum(-1)


def in_dtype(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Round weights to a dtype; where it cannot hold the largest, all are made smaller alike."""
    most = torch.finfo(dtype).max
    largest = weights.abs().amax(-1, keepdim=True)
    return torch.where(largest > most, weights * (most / largest), weights).to(dtype)


def preferences(gram: Tensor, pref_vector: Tensor | None, *, mean: bool = True) -> Tensor:
    """``[..., K]`` in float64: the preferences given, or equal ones: ``1 / K`` each, or 1.

    Raises:
        ValueError: ``gram`` is no Gram matrix, or ``pref_vector`` not ``[K]``, or, on a CPU, not
            finite.
    """
    if pref_vector is None:
        check_gram(gram)
        share = 1 / gram.shape[-1] if mean else 1.0
        return torch.full_like(gram[..., 0, :], share, dtype=torch.float64)
    check_gram(gram, pref_vector=(pref_vector, 1))
    check_finite("pref_vector", pref_vector)
    return pref_vector.to(gram.device, torch.float64).expand(gram.shape[:-1])


def check_finite(name: str, values: Tensor) -> None:
    """Refuse numbers that are not finite, where values may be read.

    Raises:
        ValueError: the message names them.
    """
    if may_look(values) and not values.isfinite().all():
        raise ValueError(f"{name}: expected finite numbers, got {values.tolist()}")


def rounding(gram: Tensor) -> float:
    """Relative error that the entries of a Gram matrix may have together."""
    return gram.shape[-1] * torch.finfo(gram.dtype).eps


def scaled(gram: Tensor) -> Tensor:
    """G in float64 with a mean diagonal of 1, made definite beyond its own rounding errors."""
    check_gram(gram)
    matrix = gram.double()
    mean = diagonal(matrix).mean(-1)[..., None, None]
    matrix = matrix / torch.where(mean > 0, mean, 1.0)
    return matrix + torch.diag_embed(rounding(gram) * diagonal(matrix))


class Directions(NamedTuple):
    """The Gram matrix of the unit gradients, and the gradients' inverse norms (0 for none)."""

    cosines: Tensor
    inverse_norms: Tensor


def directions(gram: Tensor) -> Directions:
    """Divide all gradients by their norms."""
    check_gram(gram)
    squares = diagonal(gram).double()
    inverse = torch.where(squares > 0, squares.rsqrt(), 0.0)
    return Directions(inverse[..., None] * gram.double() * inverse[..., None, :], inverse)
