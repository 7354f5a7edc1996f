"""Gradient surgery on a flat buffer of task gradients.

``rows`` is the ``[K, P]`` matrix J of K task gradients.  PCGrad and its relatives give a weighted
sum of its rows whose weights depend only on the K x K matrix of dot products ``G = J Jᵀ``::

    G = gram(rows)                         one pass over memory
    c = pcgrad_weights(G, order)           K x K numbers, on the device (.balancing)
    combine_adamw_(rows, c, ...)           one pass: sum_k c_k J_k feeds AdamW, never stored

Nothing here waits for the device.  The norm of the combined gradient is ``cᵀ G c`` and a
non-finite value shows on the diagonal of G, so clipping and the overflow check of loss scaling
cost no pass of their own (:func:`update_guard`).

Each operator is C++ on the CPU and, where the extension was built with it, CUDA; the functions
``*_reference`` say in plain torch what it computes.  Sums are kept in float32 over blocks and in
float64 beyond, or all in float64 for float64 rows.

AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, Algorithm 2.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._extension import has_kernel
from ..registration.backend import declare, register_fake
from ..registration.differentiation import register_derivative
from ..registration.validation import check_data, check_number, check_tensor

_ops = torch.ops.superbert


def _compute_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


# ---- references: what the operators compute, in plain torch --------------------------------------


def gram_reference(rows: Tensor, offsets: Sequence[int]) -> Tensor:
    """``[S, K, K]``: dot products of the rows over each segment of columns."""
    rows = rows.to(_compute_dtype(rows))
    segments = [rows[:, begin:end] for begin, end in pairwise(offsets)]
    return torch.stack([segment @ segment.T for segment in segments])


def combine_reference(rows: Tensor, weights: Tensor) -> Tensor:
    """``[P]``: the weighted sum of the rows, in their dtype."""
    return (weights @ rows.to(weights.dtype)).to(rows.dtype)


def combine_out_reference(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    """The weighted sum of the rows, into ``out``."""
    out.copy_(weights @ rows.to(weights.dtype))


def combine_adamw_reference_(
    rows: Tensor,
    weights: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_precision: Tensor | None,
    lr: Tensor,
    step: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """AdamW on the weighted sum of the rows; changes nothing where ``skip`` is true.

    So it does where the step is below 1.
    """
    gradient = weights @ rows.to(weights.dtype)
    if scale is not None:
        gradient = gradient * scale.to(gradient.dtype)
    lr, step = lr.double(), step.double()
    skipped = (step >= 1).logical_not()  # NaN too
    if skip is not None:
        skipped |= skip.bool()
    new_avg = beta1 * exp_avg + (1 - beta1) * gradient
    new_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * gradient * gradient
    denominator = (new_avg_sq / (1 - beta2**step)).sqrt() + eps
    new_master = master * (1 - lr * weight_decay) - lr / (1 - beta1**step) * new_avg / denominator
    for state, new in ((exp_avg, new_avg), (exp_avg_sq, new_avg_sq), (master, new_master)):
        state.copy_(torch.where(skipped, state, new))
    if low_precision is not None:
        copy = master.to(low_precision.dtype)
        low_precision.copy_(torch.where(skipped, low_precision, copy))


def combine_adamw_segments_reference_(
    rows: Tensor,
    weights: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_precision: Tensor | None,
    ends: Sequence[int],
    groups: Sequence[int],
    decayed: int,
    lr: Tensor,
    step: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """:func:`combine_adamw_reference_` on each segment, cut where the decay ends."""
    for (begin, end), group in zip(pairwise([0, *ends]), groups, strict=True):
        border = min(max(begin, decayed), end)
        for own, decay in ((slice(begin, border), weight_decay), (slice(border, end), 0.0)):
            if group >= 0 and own.start < own.stop:
                combine_adamw_reference_(
                    rows[:, own],
                    weights.view(-1, len(rows))[group],
                    master[own],
                    exp_avg[own],
                    exp_avg_sq[own],
                    None if low_precision is None else low_precision[own],
                    lr,
                    step,
                    scale,
                    skip,
                    beta1,
                    beta2,
                    eps,
                    decay,
                )


# ---- registration ------------------------------------------------------------------------------


def declare_operators(references: Mapping[str, Callable[..., object]]) -> None:
    """Declare operators that are C++ on the CPU and, without the CUDA part, torch on a GPU."""
    for name, reference in references.items():
        has_cuda = has_kernel(name, "CUDA")
        declare(name, cpu="cpp", cuda="cuda" if has_cuda else "torch")
        if not has_cuda:
            torch.library.impl(f"superbert::{name}", "cuda", reference)


declare_operators(
    {
        "gram": gram_reference,
        "combine": combine_reference,
        "combine_out": combine_out_reference,
        "combine_adamw_": combine_adamw_reference_,
        "combine_adamw_segments_": combine_adamw_segments_reference_,
    }
)


@register_fake("gram")
def _(rows: Tensor, offsets: Sequence[int]) -> Tensor:
    num_tasks = rows.shape[0]
    return rows.new_empty((len(offsets) - 1, num_tasks, num_tasks), dtype=_compute_dtype(rows))


@register_fake("combine")
def _(rows: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[1])


@register_fake("combine_out")
def _(rows: Tensor, weights: Tensor, out: Tensor) -> None:
    pass


@register_fake("combine_adamw_")
@register_fake("combine_adamw_segments_")
def _(*arguments: object) -> None:
    pass


# ---- gradients -----------------------------------------------------------------------------------
# Of the two functions that somebody may want to differentiate (a penalty on conflicts, weights that
# are learnt); they are no part of a training step, and stay in plain torch.


def _save_gram(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, offsets = inputs
    ctx.save_for_backward(rows)
    ctx.shape, ctx.offsets = rows.shape, offsets


def _gram_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (rows,) = ctx.saved_tensors
    check_data(grad=grad)
    check_tensor("rows", rows, ctx.shape, rows.dtype, grad.device)
    symmetric = grad + grad.mT
    segments = zip(symmetric, pairwise(ctx.offsets), strict=True)
    gradients = [matrix @ rows[:, begin:end].to(matrix.dtype) for matrix, (begin, end) in segments]
    # Put together, since torch.func.vmap cannot write in place; columns of no segment get zeros.
    before, after = rows[:, : ctx.offsets[0]], rows[:, ctx.offsets[-1] :]
    gradients = [torch.zeros_like(before), *gradients, torch.zeros_like(after)]
    return torch.cat([gradient.to(rows.dtype) for gradient in gradients], 1), None


def _save_combine(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, weights = ctx.saved_tensors
    wants_rows, wants_weights = ctx.needs_input_grad[:2]
    check_data(grad=grad)
    check_tensor("weights", weights, weights.shape[:1], weights.dtype, grad.device)
    check_tensor("rows", rows, (len(weights), len(grad)), rows.dtype, grad.device)
    grad = grad.to(weights.dtype)
    grad_rows = torch.outer(weights, grad).to(rows.dtype) if wants_rows else None
    grad_weights = rows.to(weights.dtype) @ grad if wants_weights else None
    return grad_rows, grad_weights


register_derivative("gram", _gram_backward, _save_gram, name="gram", instead="rows @ rows.T")
register_derivative(
    "combine", _combine_backward, _save_combine, name="combine", instead="weights @ rows"
)


# ---- public functions --------------------------------------------------------------------------


def gram(rows: Tensor, offsets: Sequence[int] | None = None) -> Tensor:
    """Dot products between the task gradients, in one pass over memory.

    Args:
        rows: ``[K, P]`` task gradients, any K from 1 on, float32, float64, bfloat16 or float16;
            they may lie apart (``stride(0) >= P``), columns must be contiguous.
        offsets: S + 1 ascending column numbers; segment s is the columns
            ``offsets[s]:offsets[s + 1]`` (for surgery by layer).  None: all columns.

    Returns:
        ``[K, K]`` symmetric, or ``[S, K, K]`` with ``offsets``; float32 (float64 for float64 rows).

    Raises:
        ValueError: if a shape, dtype or stride is not as above.
    """
    if offsets is None:
        return _ops.gram(rows, [0, rows.shape[-1]])[0]
    return _ops.gram(rows, offsets)


def combine(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """The combined gradient ``sum_k weights[k] * rows[k]``, in one pass over memory.

    Args:
        rows: ``[K, P]`` as for :func:`gram`.
        weights: ``[K]`` float32 (float64 for float64 rows).
        out: ``[P]`` to write into, of any of the dtypes (float64 exactly where rows are); it must
            not overlap ``rows`` or ``weights``.

    Returns:
        ``[P]`` in the dtype of ``rows``, or ``out``.

    Raises:
        ValueError: if a shape, dtype, stride or device is not as above.
    """
    if out is None:
        return _ops.combine(rows, weights)
    _ops.combine_out(rows, weights, out)
    return out


def combine_adamw_(
    rows: Tensor,
    weights: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_precision: Tensor | None = None,
    *,
    lr: Tensor | float,
    step: Tensor | int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """One step of AdamW on the combined gradient, which is never stored.

    Computes what ``torch.optim.AdamW`` does with ``scale * sum_k weights[k] * rows[k]`` as the
    gradient: decoupled weight decay, bias correction by ``step``.  The 0-dim arguments live on the
    device, so that a CUDA graph can replay with new values and nothing waits for the host.

    Args:
        rows: ``[K, P]`` as for :func:`gram`; may be a slice of columns, for parameter groups.
        weights: ``[K]`` float32 (float64 for float64 rows).
        master: ``[P]`` float32 weights (float64 for float64 rows), updated in place.
        exp_avg: ``[P]`` first moment, like ``master``.
        exp_avg_sq: ``[P]`` second moment, like ``master``.
        low_precision: ``[P]`` bfloat16 or float16 copy of the weights, written too.
        lr: learning rate; a number is finite and not negative.
        step: number of this step, the first being 1.  Below that, where the bias correction would
            divide by 0, a CPU raises; a GPU, which the host must not wait for, writes nothing.
        betas: decay rates of the moments, from 0 to less than 1.
        eps: added to the root of the second moment; finite and not negative.
        weight_decay: decoupled weight decay; finite and not negative.
        scale: multiplies the combined gradient: clipping and 1 / loss scale (:func:`update_guard`).
        skip: where true, nothing is written.

    Raises:
        ValueError: if a shape, dtype, stride, device or number is not as above, or something that
            is written overlaps another argument.
    """
    lr, step = _on_device(lr, step, rows)
    _ops.combine_adamw_(
        *(rows, weights, master, exp_avg, exp_avg_sq, low_precision),
        *(lr, step, scale, skip, betas[0], betas[1], eps, weight_decay),
    )


def _on_device(lr: Tensor | float, step: Tensor | int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Check a learning rate; return it and a step's number as tensors on the rows' device."""
    check_number("lr", lr)
    if not isinstance(lr, Tensor):
        lr = torch.full((), lr, dtype=torch.float64, device=rows.device)
    if not isinstance(step, Tensor):
        step = torch.full((), step, dtype=torch.int64, device=rows.device)
    return lr, step


def combine_adamw_segments_(
    rows: Tensor,
    weights: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    low_precision: Tensor | None = None,
    *,
    ends: Sequence[int],
    groups: Sequence[int],
    decayed: int | None = None,
    lr: Tensor | float,
    step: Tensor | int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
) -> None:
    """:func:`combine_adamw_` on segments of columns that have weights of their own, in one pass.

    On a GPU up to 256 segments are one launch.  It moves 16 bytes of a row at a time if segments
    and ``decayed`` are multiples of 16 bytes, as parameters of a gradient buffer are, and the
    tensors alike aligned; elsewhere one element.

    Args:
        rows: ``[K, P]`` as for :func:`gram`.
        weights: ``[G, K]``, or ``[K]`` for one group, float32 (float64 for float64 rows).
        master: ``[P]``, as for :func:`combine_adamw_`, as are the other tensors.
        exp_avg: ``[P]`` first moment.
        exp_avg_sq: ``[P]`` second moment.
        low_precision: ``[P]`` copy of the weights.
        ends: S ascending column numbers, the last of them P; segment s is the columns
            ``ends[s - 1]:ends[s]``, the first one from 0 on.
        groups: S numbers of rows of ``weights``; -1 for columns that are left as they are.
        decayed: so many columns decay, from the first; None: all.
        lr: learning rate.
        step: number of this step, the first being 1.
        betas: decay rates of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        scale: multiplies the combined gradient.
        skip: where true, nothing is written.

    Raises:
        ValueError: if a shape, dtype, stride, device or number is not as above, or something that
            is written overlaps another argument.
    """
    lr, step = _on_device(lr, step, rows)
    _ops.combine_adamw_segments_(
        *(rows, weights, master, exp_avg, exp_avg_sq, low_precision),
        *(ends, groups, rows.shape[-1] if decayed is None else decayed),
        *(lr, step, scale, skip, betas[0], betas[1], eps, weight_decay),
    )


class UpdateGuard(NamedTuple):
    """Norm, scale and skip flag of a combined gradient, from G; 0-dim tensors on the device.

    Attributes:
        norm: its L2 norm, unscaled and before clipping.
        scale: factor for :func:`combine_adamw_`: clipping times 1 / loss scale.
        skip: true if any task gradient holds a NaN or an infinity.
    """

    norm: Tensor
    scale: Tensor
    skip: Tensor


def combined_norm(gram: Tensor, weights: Tensor) -> Tensor:
    """L2 norm of ``sum_k weights[k] * rows[k]`` from the Gram matrix of the rows, 0-dim.

    With a leading dimension on both, over segments of columns that have weights of their own.
    """
    weights = weights.double()
    squares = weights[..., None, :] @ gram.double() @ weights[..., None]
    return squares.sum().clamp(min=0).sqrt().to(gram.dtype)


def _check_guarded(
    gram: Tensor, weights: Tensor, max_norm: Tensor | float | None, loss_scale: Tensor | float
) -> None:
    check_data(gram=gram, weights=weights, max_norm=max_norm, loss_scale=loss_scale)
    if gram.dim() not in (2, 3) or gram.shape[-1] != gram.shape[-2]:
        raise ValueError(f"gram: expected [K, K] or [S, K, K], got {list(gram.shape)}")
    if weights.shape != gram.shape[:-1]:
        raise ValueError(f"weights: expected {list(gram.shape[:-1])}, got {list(weights.shape)}")
    if not (max_norm is None or isinstance(max_norm, Tensor) or max_norm >= 0):
        raise ValueError(f"max_norm: expected a number of at least 0, got {max_norm}")
    if not (isinstance(loss_scale, Tensor) or 0 < loss_scale < math.inf):
        raise ValueError(f"loss_scale: expected a finite number above 0, got {loss_scale}")


def update_guard(
    gram: Tensor,
    weights: Tensor,
    *,
    max_norm: Tensor | float | None = None,
    loss_scale: Tensor | float = 1.0,
) -> UpdateGuard:
    """Norm, clipping factor and overflow check of an update, all from the Gram matrix.

    Args:
        gram: ``[K, K]`` Gram matrix of the task gradients, float32 or float64; ``[S, K, K]`` by
            segments of columns.
        weights: ``[K]`` weights of the combination, likewise; ``[S, K]`` by segments.
        max_norm: clip the combined gradient to this norm, as ``clip_grad_norm_``; not negative.
            None, or infinite: never.  The value of a tensor is not looked at.
        loss_scale: what the losses were multiplied by, finite and above 0; likewise.

    Returns:
        0-dim tensors on the device of ``gram``: norm, factor and overflow.

    Raises:
        ValueError: a shape or a number is not as above, or a storage was freed.
    """
    _check_guarded(gram, weights, max_norm, loss_scale)
    norm = combined_norm(gram, weights) / loss_scale
    scale = torch.ones_like(norm) / loss_scale
    if max_norm is not None:
        scale = scale * (max_norm / (norm + 1e-6)).clamp(max=1.0)
    finite = torch.isfinite(gram.diagonal(dim1=-2, dim2=-1)).all()
    skip = ~(finite & torch.isfinite(norm))
    return UpdateGuard(norm, scale, skip)
