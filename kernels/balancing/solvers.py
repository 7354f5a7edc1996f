"""Solve the small problems of balancing methods: eigenvalues, quadratic programs, fair weights.

The solvers are C++ and CUDA from one source, csrc/balancing_solvers.h.  All take and return
contiguous float64 on one device and never wait for it; K has no limit but memory.  Of G matrices
``[G, K, K]`` each is solved by itself, all in one launch.
"""

import torch
from torch import Tensor

from .._extension import has_kernel
from ..registration.backend import declare, register_fake
from ..registration.differentiation import refuse_derivative
from .gram_matrix import left_times, times

_ops = torch.ops.superbert

for _name in (
    "symmetric_eigen",
    "project_onto_dual_cone",
    "solve_mgda",
    "solve_cagrad",
    "solve_fairgrad",
):
    declare(_name, cpu="cpp", cuda="cuda" if has_kernel(_name, "CUDA") else None)
    refuse_derivative(_name, name=_name, instead="gram.detach()")


@register_fake("symmetric_eigen")
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[:-1]), torch.empty_like(matrix)


@register_fake("project_onto_dual_cone")
def _(gram: Tensor, lower: Tensor) -> Tensor:
    return torch.empty_like(lower)


@register_fake("solve_mgda")
@register_fake("solve_cagrad")
@register_fake("solve_fairgrad")
def _(gram: Tensor, *_setting: float) -> Tensor:
    return gram.new_empty(gram.shape[:-1])


def eigen(matrix: Tensor, relative: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues, which of them count (more than ``relative`` to the largest), eigenvectors."""
    values, vectors = _ops.symmetric_eigen(matrix)
    return values, values > relative * values.amax(-1, keepdim=True), vectors


def solve_least_squares(matrix: Tensor, target: Tensor, relative: float) -> Tensor:
    """``matrix⁺ target``; eigenvalues up to ``relative`` times the largest count as zero."""
    values, counts, vectors = eigen(matrix, relative)
    inverse = torch.where(counts, 1.0 / values, 0.0)
    return times(vectors, inverse * left_times(target, vectors))


def project_onto_dual_cone(gram: Tensor, wanted: Tensor) -> Tensor:
    """Project combinations of the gradients onto the cone of what conflicts with none of them.

    Args:
        gram: ``[..., K, K]``, definite.
        wanted: ``[..., N, K]``, the weights of each combination.

    Returns:
        ``[..., N, K]``, the weights of its projection.
    """
    projected: Tensor = _ops.project_onto_dual_cone(gram, wanted.contiguous())
    return projected


def solve_mgda(gram: Tensor) -> Tensor:
    """Weights ``[..., K]`` of the shortest convex combination, of ``gram [..., K, K]``."""
    weights: Tensor = _ops.solve_mgda(gram)
    return weights


def solve_cagrad(gram: Tensor, c: float) -> Tensor:
    """Weights ``[..., K]`` of the best worst-case direction within ``c |g0|`` of the mean."""
    weights: Tensor = _ops.solve_cagrad(gram, c)
    return weights


def solve_fairgrad(gram: Tensor, alpha: float) -> Tensor:
    """Weights ``[..., K]`` with ``G c = c^(-1 / alpha)``, of ``gram [..., K, K]`` with norm 1."""
    weights: Tensor = _ops.solve_fairgrad(gram, alpha)
    return weights
