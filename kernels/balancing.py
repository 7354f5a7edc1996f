"""Balancing methods: from the Gram matrix of the task gradients to the weights of their sum.

Every method here computes weights ``c [K]`` from ``G = J Jᵀ [K, K]``; the update is
``sum_k c_k g_k``.  They run where G lies, never wait for the device, and can be part of a CUDA
graph.  None has an absolute epsilon: gradients times 1e-12 or 1e12 give the same weights (with
:func:`nash_mtl`'s ``max_norm``: the same update).
A method that divides by a task's norm gives a task with zero gradient the weight 0; where all are
zero the weights are finite.  Weights that the dtype of G cannot hold are all made smaller alike,
until it holds the largest.  Where the diagonal of G is not finite (a gradient holds a NaN or an
infinity, or float32 cannot hold its squared norm, from 1.8e19 on), all weights are NaN, by every
method: such a step has no update, and :func:`.update_guard` skips it.  Squared norms below 1e-38
have fewer digits in a float32 G, and below 1e-45 none: such gradients count as zero.

The problems are solved in float64; the small solvers (eigenvalues, quadratic programs, Newton's
method) are C++ and CUDA from one source, csrc/balancing_solvers.h.  K has no limit but memory, for
a few ``[K, K]`` matrices, or one for each row that :func:`upgrad` solves at a time.  Time grows
with K³, :func:`upgrad`'s with K⁴; on CUDA a problem is solved by one thread, so that beyond a
hundred or so tasks G is better taken to the CPU first.

PCGrad stands in :mod:`.surgery`; it needs a random order as well.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ._extension import has_kernel
from .registration.backend import declare, register_fake
from .registration.differentiation import refuse_derivative, without_derivative
from .registration.validation import check_number, check_order, may_look
from .surgery.gram_matrix import (
    check_gram,
    directions,
    eigen,
    in_dtype,
    is_finite,
    nan_unless_finite,
    preferences,
    rounding,
    scaled,
    solve_least_squares,
)
from .surgery.surgery import combined_norm, pcgrad_weights

_ops = torch.ops.superbert

ScaleMode = Literal["min", "median", "rmse"]

_LARGEST = torch.finfo(torch.float32).max
"""Of settings that weights are multiplied by."""

for _name in (
    "symmetric_eigen",
    "project_onto_dual_cone",
    "minimize_norm",
    "avoid_conflict",
    "bargain",
):
    declare(_name, cpu="cpp", cuda="cuda" if has_kernel(_name, "CUDA") else None)
    refuse_derivative(_name, name=_name, instead="gram.detach()")


@register_fake("symmetric_eigen")
def _(matrix: Tensor) -> tuple[Tensor, Tensor]:
    return matrix.new_empty(matrix.shape[0]), torch.empty_like(matrix)


@register_fake("project_onto_dual_cone")
def _(gram: Tensor, lower: Tensor) -> Tensor:
    return torch.empty_like(lower)


@register_fake("minimize_norm")
def _(gram: Tensor) -> Tensor:
    return gram.new_empty(gram.shape[0])


@register_fake("avoid_conflict")
def _(gram: Tensor, c: float) -> Tensor:
    return gram.new_empty(gram.shape[0])


@register_fake("bargain")
def _(gram: Tensor, alpha: float) -> Tensor:
    return gram.new_empty(gram.shape[0])


# ---- fixed weights -------------------------------------------------------------------------------


@nan_unless_finite
def total(gram: Tensor) -> Tensor:
    """Plain multitask training: the sum of the gradients.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    check_gram(gram)
    return torch.ones_like(gram[0])


@nan_unless_finite
def mean(gram: Tensor) -> Tensor:
    """The mean of the gradients.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    check_gram(gram)
    return torch.full_like(gram[0], 1 / len(gram))


@nan_unless_finite
def proportional(gram: Tensor, sizes: Tensor) -> Tensor:
    """Weights in proportion to sizes, of the data sets, say; they add up to 1.

    Args:
        gram: ``[K, K]``, floating point.
        sizes: ``[K]``, any dtype, not negative, and not all 0.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above, as far as the values of ``sizes`` are on a CPU.
    """
    check_gram(gram, sizes=(sizes, 1))
    if may_look(sizes) and not (min(values := sizes.tolist()) >= 0 and 0 < sum(values) < math.inf):
        raise ValueError(f"sizes: expected finite numbers of at least 0, not all 0, got {values}")
    # float16 holds no more than 65,504 examples.
    sizes = sizes.to(gram.device, torch.promote_types(gram.dtype, torch.float32))
    return (sizes / sizes.sum()).to(gram.dtype)


# ---- projections ---------------------------------------------------------------------------------


@nan_unless_finite
def auxiliary_pcgrad(gram: Tensor, main: int = 0, auxiliary_weight: float = 0.3) -> Tensor:
    """PCGrad between one main task and the weighted sum of all others.

    The others enter as one gradient ``g_aux = auxiliary_weight * sum of the auxiliaries``; main and
    auxiliary gradient are then projected by each other where they conflict.

    Args:
        gram: ``[K, K]``, floating point.
        main: the number of the main task, from 0.
        auxiliary_weight: factor on the sum of the others, from 0 to the largest float32.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_gram(gram)
    check_number("auxiliary_weight", auxiliary_weight, _LARGEST)
    if main not in range(len(gram)):
        raise ValueError(f"main: expected 0 to {len(gram) - 1}, got {main}")
    matrix = gram.double()
    members = matrix.new_full((2, len(gram)), auxiliary_weight)
    members[0] = 1.0
    is_main = torch.arange(len(gram), device=gram.device) == main
    members = torch.where(torch.stack([is_main, ~is_main]), members, 0.0)
    order = torch.tensor([0, 1], device=gram.device).expand(2, 2).contiguous()
    weights = pcgrad_weights(members @ matrix @ members.T, order) @ members
    return in_dtype(weights, gram.dtype)


class GradVacStep(NamedTuple):
    """What :func:`gradvac` returns.

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
    check_order(order, len(gram))
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: expected 0 to 1, got {beta}")
    gram, targets = without_derivative("gradvac", "gram.detach()", gram, targets)
    cosines, inverse_norms = directions(gram)
    task = torch.arange(len(gram), device=gram.device)
    present_targets = targets = targets.double()
    # Row i: the modified gradient i in terms of the unit gradients, times its inverse norm.
    rows = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    for other in order.unbind(1):
        norm = ((rows @ cosines) * rows).sum(1).clamp(min=0).sqrt()
        cosine = (rows * cosines[other]).sum(1) / torch.where(norm > 0, norm, 1.0)
        target = targets[task, other]
        present = (other != task) & (cosines[task, task] > 0) & (cosines[other, other] > 0)
        ours, theirs = (1 - cosine**2).clamp(min=0).sqrt(), (1 - target**2).clamp(min=1e-16).sqrt()
        turn = norm * (target * ours - cosine * theirs) / theirs
        turn = torch.where(present & (cosine < target), turn, 0.0)
        rows = rows.scatter_add(1, other[:, None], turn[:, None])
        newest = torch.where(present, torch.lerp(target, cosine, beta), target)
        targets = targets.scatter(1, other[:, None], newest[:, None])
    norms = gram.diagonal().double().sqrt()
    weights = (norms[:, None] * rows * inverse_norms).sum(0)
    finite = is_finite(gram)
    weights = torch.where(finite, weights, torch.nan)
    targets = torch.where(finite, targets, present_targets)
    return GradVacStep(in_dtype(weights, gram.dtype), targets.to(gram.dtype))


@nan_unless_finite
def upgrad(gram: Tensor, pref_vector: Tensor | None = None) -> Tensor:
    """UPGrad: the weighted sum of the gradients, each projected onto the dual cone of all of them.

    Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024, section 3.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]`` weights of that sum, any dtype; None: the mean, ``1 / K`` each.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    each = torch.diag(preferences(gram, pref_vector))
    return in_dtype(_ops.project_onto_dual_cone(scaled(gram), each).sum(0), gram.dtype)


@nan_unless_finite
def dual_projection(gram: Tensor, pref_vector: Tensor | None = None) -> Tensor:
    """DualProj: the weighted sum of the gradients projected onto the dual cone of all of them.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, equation 11.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]`` weights of that sum, any dtype; None: the mean, ``1 / K`` each.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    wanted = preferences(gram, pref_vector)
    return in_dtype(_ops.project_onto_dual_cone(scaled(gram), wanted[None])[0], gram.dtype)


# ---- optima --------------------------------------------------------------------------------------


@nan_unless_finite
def mgda(gram: Tensor) -> Tensor:
    """MGDA: the shortest convex combination of the gradients.

    Désidéri, "Multiple-gradient descent algorithm", Comptes Rendus Mathématique 2012.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    return _ops.minimize_norm(scaled(gram)).to(gram.dtype)


@nan_unless_finite
def cagrad(gram: Tensor, c: float = 0.5) -> Tensor:
    """CAGrad: the best worst-case direction within ``c |g0|`` of the mean gradient ``g0``.

    Liu et al., "Conflict-Averse Gradient Descent", NeurIPS 2021, Algorithm 1.

    Args:
        gram: ``[K, K]``, floating point.
        c: radius in units of ``|g0|``: 0 is the mean itself; from 1 on no task is worsened.  At
            most the largest float32.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("c", c, _LARGEST)
    matrix = scaled(gram)
    weights = _ops.avoid_conflict(matrix, c)
    if c >= 1:
        # Where the gradients' hull holds zero, the best that no task is worsened by is the
        # projection of g0; going on until c |g0| is reached would follow rounding errors.
        mean_projected = _ops.project_onto_dual_cone(matrix, preferences(gram, None)[None])[0]
        weights = torch.where(_hull_holds_zero(matrix, rounding(gram)), mean_projected, weights)
    return in_dtype(weights, gram.dtype)


def _hull_holds_zero(matrix: Tensor, relative: float) -> Tensor:
    """Whether the shortest convex combination of the gradients is zero but for rounding."""
    shortest = _ops.minimize_norm(matrix)
    longest = shortest @ matrix.diagonal().sqrt()  # had the gradients one direction
    return shortest @ matrix @ shortest <= 4 * relative * longest**2


@nan_unless_finite
def nash_mtl(gram: Tensor, max_norm: float | None = None) -> Tensor:
    """Nash-MTL: the Nash bargaining solution, ``G c = 1 / c``.

    Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, equation 2 and Algorithm 1.

    Args:
        gram: ``[K, K]``, floating point.
        max_norm: the combined gradient is limited to this norm; 0: no limit.  Before that its norm
            is ``sqrt(K)`` whatever the gradients' scale.  None: G is divided by its Frobenius norm
            instead, so that the weights do not depend on the gradients' scale.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("max_norm", max_norm)
    weights, scale = _bargain(gram, alpha=1.0)
    if max_norm is None:
        return in_dtype(weights, gram.dtype)
    weights = weights / torch.where(scale > 0, scale, 1.0).sqrt()
    if max_norm > 0:
        norm = combined_norm(gram.double(), weights)
        weights = weights * (max_norm / torch.where(norm > 0, norm, 1.0)).clamp(max=1.0)
    return in_dtype(weights, gram.dtype)


@nan_unless_finite
def fairgrad(gram: Tensor, alpha: float = 1.0) -> Tensor:
    """FairGrad: alpha-fair weights, ``G c = c^(-1 / alpha)``.

    Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, equation 6, for G
    divided by its Frobenius norm.

    Args:
        gram: ``[K, K]``, floating point.
        alpha: 0 is the mean, 1 is Nash-MTL, larger values favour the task that gains least; finite.
            Between 0 and 1e-8 it is taken for 1e-8.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    check_number("alpha", alpha)
    return in_dtype(_bargain(gram, alpha)[0], gram.dtype) if alpha > 0 else mean(gram)


def _bargain(gram: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """FairGrad's weights in float64, and what G was divided by."""
    matrix = scaled(gram)
    norm = matrix.norm()
    weights = _ops.bargain(matrix / torch.where(norm > 0, norm, 1.0), alpha)
    return weights, norm * gram.diagonal().double().mean()


# ---- closed forms --------------------------------------------------------------------------------


@nan_unless_finite
def imtl_g(gram: Tensor) -> Tensor:
    """IMTL-G: the combination with equal projections onto all gradients; weights add up to 1.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, section 3.1.

    Args:
        gram: ``[K, K]``, floating point.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: ``gram`` is not as above.
    """
    cosines, inverse_norms = directions(gram)
    ones = (inverse_norms > 0).double()
    weights = inverse_norms * solve_least_squares(cosines, ones, rounding(gram))
    total_weight = weights.sum()
    exists = total_weight.abs() > 1e-12 * weights.abs().sum()
    weights = torch.where(exists, weights / torch.where(exists, total_weight, 1.0), 0.0)
    return in_dtype(weights, gram.dtype)


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
    scale = _SCALES[scale_mode](torch.where(counts, values, torch.inf), counts.sum())
    balance = torch.where(counts, (scale / values).sqrt(), 0.0)
    coordinates = vectors.mean(0) if pref_vector is None else wanted @ vectors
    return in_dtype(vectors @ (balance * coordinates), gram.dtype)


def _median(values: Tensor, rank: Tensor) -> Tensor:
    return values.sort().values.gather(0, ((rank - 1).clamp(min=0) // 2)[None])[0]


def _mean_of_finite(values: Tensor, rank: Tensor) -> Tensor:
    return torch.where(values.isfinite(), values, 0.0).sum() / rank.clamp(min=1)


_SCALES: Mapping[ScaleMode, Callable[[Tensor, Tensor], Tensor]] = {
    "min": lambda values, _rank: values.min(),
    "median": _median,
    "rmse": _mean_of_finite,
}
"""From the eigenvalues that count, infinite elsewhere, and their number to Aligned-MTL's scale."""


@nan_unless_finite
def config(gram: Tensor, pref_vector: Tensor | None = None) -> Tensor:
    """ConFIG: the direction with chosen cosines to all gradients, as long as they reach along it.

    Liu, Chu and Thuerey, "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks", ICLR 2025, equation 2.

    Args:
        gram: ``[K, K]``, floating point.
        pref_vector: ``[K]``, any dtype: the cosines are in proportion to it; None: equal.

    Returns:
        ``[K]`` weights in the dtype of ``gram``.

    Raises:
        ValueError: an argument is not as above.
    """
    cosines, inverse_norms = directions(gram)
    wanted = torch.where(inverse_norms > 0, preferences(gram, pref_vector, mean=False), 0.0)
    units = solve_least_squares(cosines, wanted, rounding(gram))
    norm_squared = units @ cosines @ units
    reach = gram.diagonal().double().sqrt() @ cosines @ units
    exists = norm_squared > 0
    scale = torch.where(exists, reach / torch.where(exists, norm_squared, 1.0), 0.0)
    return in_dtype(scale * inverse_norms * units, gram.dtype)


@nan_unless_finite
def krum(gram: Tensor, num_byzantine: int = 0, num_selected: int = 1) -> Tensor:
    """Multi-Krum: the mean of the gradients that lie closest to their neighbours.

    Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017.

    Args:
        gram: ``[K, K]``, floating point, with K at least ``num_byzantine + 3``.
        num_byzantine: how many gradients may be arbitrary.
        num_selected: how many are averaged.

    Returns:
        ``[K]`` weights in the dtype of ``gram``: ``1 / num_selected`` or 0.

    Raises:
        ValueError: an argument is not as above.
    """
    check_gram(gram)
    neighbours = len(gram) - num_byzantine - 2
    if num_byzantine not in range(len(gram) - 2) or num_selected not in range(1, len(gram) + 1):
        raise ValueError(
            f"Krum of {len(gram)} gradients needs at least num_byzantine + 3 of them, "
            f"num_byzantine from 0 and num_selected from 1 to {len(gram)}"
        )
    squares = gram.diagonal().double()
    distances = (squares[:, None] + squares - 2 * gram.double()).clamp(min=0).sqrt()
    distances.fill_diagonal_(torch.inf)
    scores = distances.topk(neighbours, largest=False).values.sum(1)
    selected = scores.topk(num_selected, largest=False).indices
    return torch.zeros_like(gram[0]).index_fill(0, selected, 1 / num_selected)


# ---- learned weights -----------------------------------------------------------------------------


@nan_unless_finite
def gradnorm(
    gram: Tensor, weights: Tensor, loss_ratios: Tensor, alpha: float = 1.5, lr: float = 0.025
) -> Tensor:
    """GradNorm: one step of the weights towards gradients whose norms follow the training rates.

    Chen et al., "GradNorm", ICML 2018, Algorithm 1.  The norms are taken relative to their mean,
    so that the step does not depend on the gradients' scale.

    Args:
        gram: ``[K, K]`` of the unweighted gradients, floating point.
        weights: ``[K]`` present weights, adding up to K; ones at first.
        loss_ratios: ``[K]`` present over initial losses, not negative; all 0 count as equal.
        alpha: strength of the pull towards equal rates; finite and not negative.
        lr: step of the weights, from 0 to the largest float32.

    Returns:
        ``[K]`` new weights in the dtype of ``weights``, not negative, adding up to K; the present
        ones where all would be 0.  All are NaN where the diagonal of ``gram`` or a loss ratio is
        not finite, or a ratio is negative; keep the present ones then.

    Raises:
        ValueError: a shape, dtype or number is not as above.
    """
    check_gram(gram, weights=(weights, 1), loss_ratios=(loss_ratios, 1))
    check_number("alpha", alpha)
    check_number("lr", lr, _LARGEST)
    norms = gram.diagonal().double().sqrt()
    present, ratios = weights.double(), loss_ratios.double()
    weighted = present * norms
    average, mean_ratio = weighted.mean(), ratios.mean()
    rates = torch.where(mean_ratio == 0, 1.0, ratios / mean_ratio)
    wanted = torch.where(average > 0, average * rates**alpha, 0.0)
    slope = norms * (weighted - wanted).sign() / torch.where(average > 0, average, 1.0)
    new = (present - lr * slope).clamp(min=0)
    new = torch.where(new.sum() == 0, present, new)
    new = torch.where(((ratios >= 0) & ratios.isfinite()).all(), new, torch.nan)
    return (new * (len(gram) / new.sum())).to(weights.dtype)
