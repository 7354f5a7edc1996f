"""Attention over packed sequences.

The tokens of all sequences lie side by side in one stream; sequence ``s`` owns the query rows
``cu_seqlens_q[s]:cu_seqlens_q[s + 1]`` and the key rows ``cu_seqlens_k[s]:cu_seqlens_k[s + 1]``::

    S = softmax_scale * Q K^T,  -inf where a query does not see a key
    lse_i = log sum_j exp(S_ij),  P = exp(S - lse)
    O = (P f) V                            f: dropout factors, 0 or 1 / (1 - p)

    dV = (P f)^T dO,  dP = f (dO V^T),  delta_i = sum_d dO_id O_id
    dS = P (dP - delta),  dQ = softmax_scale dS K,  dK = softmax_scale dS^T Q

A query sees the keys of its own sequence, those within ``window_size = (left, right)`` of its own
place alone: with the two sequences aligned at their ends, of lengths ``n_q`` and ``n_k``, query i
sees the keys j of ::

    i + n_k - n_q - left <= j <= i + n_k - n_q + right ,

where -1 is no limit and ``causal`` is ``right = 0``.  Tiles outside of the window are not visited,
so that cost is linear in the length.  A query that sees no key, as the first ones of a sequence
with more queries than keys may, gives zeros and ``lse = -inf``, and so do rows behind the last
sequence, so a stream may be longer than its tokens.  The gradients of such a query are zero and it
takes no part in others', whatever it holds and gets as gradient, NaN too.

q, k, v are ``[T, H, D]``, float32, bfloat16 or float16, computed in float32.  But a CPU that
multiplies pairs of bfloat16 (AVX512-BF16) and has no AMX, beside which that is slow, multiplies
those inputs as they are, and P f and dS rounded to bfloat16.  The log-sum-exp is ``[H, T]``
float32.  The backward pass recomputes P from it (Dao et al., "FlashAttention", 2022,
arXiv:2205.14135) and the dropout factors from the seed, and is deterministic.

A new option enters here:

- its field, default and check: ``AttentionOptions`` in attention_options.py;
- the public functions' arguments, which they hand on to ``AttentionOptions.of``;
- the reference: ``visible_keys`` if it is about the mask, else ``attention_reference``;
- C++: ``AttentionOptions`` in csrc/attention.h; ``OPTIONS`` and ``parse_arguments`` in
  csrc/attention_cpu.cpp, one above the other; where csrc/attention_simd.cpp uses it;
- Triton: ``KernelOptions`` in attention_tiles_triton.py and where the kernels of runs and of tiles
  use it, or, for an integer, an argument beside it, since Triton compiles anew for some integers in
  a tuple; a mask that every query has one interval in, as a window is, cuts the interval in
  ``limited`` of attention_tiles_triton.py.

What is known of a batch before any layer runs is its plan (attention_plan.py), the last two
arguments of the operators.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (registers the operators)
from ..dropout.dropout import attention_dropout_factors
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.deprecation import renamed_argument
from ..registration.differentiation import differentiable_once, refuse_vmap, register_derivative
from ..registration.validation import check_data
from .attention_checks import (
    check_attention,
    check_attention_backward,
    check_boundaries,
    check_longest,
    check_packed,
    check_qkv,
    check_rows,
)
from .attention_options import AttentionOptions
from .attention_plan import AttentionPlan, attention_plan, check_plan

_ops = torch.ops.superbert


# ---- reference ----------------------------------------------------------------------------------


def visible_keys(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    total_q: int,
    total_k: int,
    options: AttentionOptions,
) -> Tensor:
    """Which key rows each query row sees: ``[total_q, total_k]``, bool."""
    num_sequences = len(cu_seqlens_q) - 1
    query = torch.arange(total_q, device=cu_seqlens_q.device)
    key = torch.arange(total_k, device=cu_seqlens_k.device)
    sequence = torch.bucketize(query, cu_seqlens_q[1:], right=True)
    inside = sequence < num_sequences
    sequence = sequence.clamp(max=num_sequences - 1)
    first, last = cu_seqlens_k[sequence], cu_seqlens_k[sequence + 1]
    limits = options.limits()
    if limits is not None:
        own = last - (cu_seqlens_q[sequence + 1] - query)  # aligned at the ends
        left, right = limits
        first, last = torch.maximum(first, own - left), torch.minimum(last, own + 1 + right)
    return inside[:, None] & (key >= first[:, None]) & (key < last[:, None])


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
    factors: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with the whole ``[H, T, T]`` score matrix, in the dtype of q.

    Args:
        q: ``[Tq, H, D]``.
        k: ``[Tk, H, D]``.
        v: ``[Tk, H, D]``.
        cu_seqlens_q: ``[S + 1]``.
        cu_seqlens_k: ``[S + 1]``.
        options: what to compute.
        factors: dropout factors ``[H, Tq, Tk]``, in place of those that the options say.
        bias: added to the scores, ``[H, Tq, Tk]``.

    Returns:
        The output ``[Tq, H, D]`` and the log-sum-exp ``[H, Tq]``.
    """
    seen = visible_keys(cu_seqlens_q, cu_seqlens_k, len(q), len(k), options)
    blind, unseen = (~seen.any(dim)[:, None, None] for dim in (1, 0))
    # What these rows hold and get as gradients must not count, and 0 times NaN would.
    q, k, v = q.masked_fill(blind, 0), k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    scores = torch.einsum("ihd,jhd->hij", q, k) * options.softmax_scale
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    # A row of -inf has no softmax; it is kept out before the exponential, for the gradient's sake.
    probabilities = scores.masked_fill(blind[:, 0], 0).softmax(-1) * seen
    if factors is None and options.seed is not None and options.dropout_p > 0:
        sizes = (q.shape[1], len(q), len(k))
        factors = attention_dropout_factors(
            *sizes, options.dropout_p, options.seed, options.rng_offset
        )
    if factors is not None:
        probabilities = probabilities * factors.to(probabilities.dtype)
    return torch.einsum("hij,jhd->ihd", probabilities, v).masked_fill(blind, 0), lse


# ---- registration -------------------------------------------------------------------------------


def _forward_fake(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _backward_fake(
    _grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _with_plan(inputs: tuple[Any, ...], without: int) -> tuple[Any, ...]:
    """The inputs of an operator; a plan, its last two, may be left out."""
    return (*inputs, *_NO_PLAN) if len(inputs) == without else inputs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.numbers, seed, runs, bounds = _with_plan(inputs, 14)
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seed, runs, bounds)
    ctx.mark_non_differentiable(lse)


_NO_PLAN = (None, None)
_NO_GRADIENTS = (None,) * (len(AttentionOptions._fields) + len(AttentionPlan._fields))
_INSTEAD = "torch.nn.functional.scaled_dot_product_attention, or float64"


@differentiable_once("flash_attn_varlen_func", _INSTEAD)
def _backward(
    ctx: Any, saved: tuple[Tensor, ...], grad_out: Tensor, _grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, seed, runs, bounds = saved
    grads = _ops.attention_backward(grad_out, *tensors, *ctx.numbers, seed, runs, bounds)
    return *grads, None, None, None, None, *_NO_GRADIENTS


def packed_forward_fake(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, without data, of ``qkv [T, 3, H, D]``."""
    total, _three, heads, width = qkv.shape
    out = qkv.new_empty((total, heads, width))
    return out, qkv.new_empty((heads, total), dtype=torch.float32)


def _packed_backward_fake(_grad_out: Tensor, qkv: Tensor, *_: object) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _packed_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    qkv, cu_seqlens, *ctx.numbers, seed, runs, bounds = _with_plan(inputs, 10)
    out, lse = output
    ctx.save_for_backward(qkv, out, lse, cu_seqlens, seed, runs, bounds)
    ctx.mark_non_differentiable(lse)


@differentiable_once("flash_attn_varlen_qkvpacked_func", _INSTEAD)
def _packed_backward(
    ctx: Any, saved: tuple[Tensor, ...], grad_out: Tensor, _grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, seed, runs, bounds = saved
    arguments = (*ctx.numbers, seed, runs, bounds)
    grad = _ops.attention_qkvpacked_backward(grad_out, *tensors, *arguments)
    return grad, None, None, *_NO_GRADIENTS


_FAKES: dict[str, Callable[..., Any]] = {
    "attention": _forward_fake,
    "attention_backward": _backward_fake,
    "attention_qkvpacked": packed_forward_fake,
    "attention_qkvpacked_backward": _packed_backward_fake,
}
for _name, _fake in _FAKES.items():
    register_fake(_name)(_fake)
    declare(_name, cpu="cpp", cuda="triton")


def _parse(
    q: Tensor, k: Tensor, arguments: tuple[Any, ...]
) -> tuple[AttentionOptions, AttentionPlan | None]:
    """The options and the plan that the last arguments of an operator are."""
    *numbers, runs, bounds = _with_plan(arguments, len(AttentionOptions._fields))
    options = AttentionOptions(*numbers)
    check_plan(runs, bounds, len(q), q)
    if runs is None:
        return options, None
    if len(k) != len(q):
        raise ValueError(
            "runs: a plan is of self-attention; expected as many rows of k as of q, "
            f"{len(q)}, got {len(k)}"
        )
    return options, AttentionPlan(runs, bounds)


@register_cuda("attention")
def _cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    from . import attention_triton

    boundaries, longest = (cu_seqlens_q, cu_seqlens_k), max(max_seqlen_q, max_seqlen_k)
    options, plan = _parse(q, k, arguments)
    check_attention(q, k, v, *boundaries, options)
    check_longest(cu_seqlens_q, longest)
    return attention_triton.forward(q, k, v, *boundaries, options, plan=plan, max_seqlen=longest)


@register_cuda("attention_backward")
def _cuda_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    from . import attention_triton

    boundaries, longest = (cu_seqlens_q, cu_seqlens_k), max(max_seqlen_q, max_seqlen_k)
    options, plan = _parse(q, k, arguments)
    check_attention(q, k, v, *boundaries, options)
    check_attention_backward(grad_out, q, out, lse)
    grads = (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape))
    saved = (grad_out, q, k, v, out, lse.contiguous(), *boundaries)
    attention_triton.backward(*saved, options, grads=grads, plan=plan, max_seqlen=longest)
    return grads


@register_cuda("attention_qkvpacked")
def _cuda_packed(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *arguments: Any
) -> tuple[Tensor, Tensor]:
    from . import attention_triton

    check_packed(qkv)
    q, k, v = qkv.unbind(1)
    options, plan = _parse(q, k, arguments)
    check_attention(q, k, v, cu_seqlens, cu_seqlens, options)
    check_longest(cu_seqlens, max_seqlen)
    return attention_triton.forward(
        q, k, v, cu_seqlens, cu_seqlens, options, plan=plan, max_seqlen=max_seqlen
    )


@register_cuda("attention_qkvpacked_backward")
def _cuda_packed_backward(
    grad_out: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *arguments: Any,
) -> Tensor:
    from . import attention_triton

    check_packed(qkv)
    q, k, v = qkv.unbind(1)
    options, plan = _parse(q, k, arguments)
    check_attention(q, k, v, cu_seqlens, cu_seqlens, options)
    check_attention_backward(grad_out, q, out, lse)
    grad = qkv.new_empty(qkv.shape)
    saved = (grad_out, q, k, v, out, lse.contiguous(), cu_seqlens, cu_seqlens)
    attention_triton.backward(
        *saved, options, grads=grad.unbind(1), plan=plan, max_seqlen=max_seqlen
    )
    return grad


for _name, _public, _formula in (
    ("attention", "flash_attn_varlen_func", (_backward, _setup_context)),
    (
        "attention_qkvpacked",
        "flash_attn_varlen_qkvpacked_func",
        (_packed_backward, _packed_setup_context),
    ),
):
    register_derivative(_name, *_formula, name=_public, instead=_INSTEAD)
    refuse_vmap(f"{_name}_backward", name=_public, instead=_INSTEAD)


# ---- public -------------------------------------------------------------------------------------


def _in_float64(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    check_data(q=q, k=k, v=v, seed=options.seed)
    out, lse = attention_reference(q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    return out, lse.detach()  # as the kernels': no gradient


def _plan_for(x: Tensor, cu_seqlens: Tensor, plan: AttentionPlan | None) -> AttentionPlan | None:
    """The plan that the operator is given: on a GPU, where both passes use it, there is one."""
    if plan is None and x.is_cuda:
        return attention_plan(cu_seqlens, x.shape[0])
    return plan


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    plan: AttentionPlan | None = None,
    stream: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention over packed sequences, with the arguments of flash-attn's function of that name.

    Args:
        q: ``[Tq, H, D]``, float32, bfloat16, float16 or float64; any strides but a contiguous last
            dimension, as for k and v.
        k: ``[Tk, H, D]``, dtype of ``q``.
        v: ``[Tk, H, D]``, dtype of ``q``.
        cu_seqlens_q: int32 ``[S + 1]``, from 0 ascending to Tq at most; later rows give zeros.
        cu_seqlens_k: int32 ``[S + 1]``, from 0 ascending to Tk at most.
        max_seqlen_q: length of the longest query sequence, or more.  Of fewer a GPU may leave rows
            of longer ones unwritten.
        max_seqlen_k: the same of key sequences.
        dropout_p: probability to drop an attention weight; 0 outside training.
        softmax_scale: multiplies the scores, finite; ``D ** -0.5`` when None.
        causal: a query sees only the keys up to its own place, sequences aligned at their ends.
        window_size: how many keys before and behind its own place a query sees, two integers; -1
            for all.  With ``causal`` none behind it.
        softcap: not supported, nor are alibi_slopes and block_table.
        alibi_slopes: see softcap.
        deterministic: accepted; the backward pass always is.
        return_attn_probs: return the log-sum-exp too.
        block_table: see softcap.
        seed: of dropout; int64, one element, on q's device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.
        plan: `kernels.attention_plan` of these boundaries, made once for several calls; None makes
            one where a GPU needs it.  Of self-attention alone: ``cu_seqlens_q`` and
            ``cu_seqlens_k`` are one tensor.
        stream: the old name of ``rng_offset``, deprecated.

    Returns:
        ``[Tq, H, D]`` in q's dtype; with ``return_attn_probs`` also the log-sum-exp ``[H, Tq]``
        (float32, no gradient) and None in the place of the probabilities, which are never stored.

    Raises:
        ValueError: a shape, dtype, device or range that does not fit, or a cu_seqlens that does not
            start at 0, ascend and stay inside the stream; the message names it.  On CUDA tensors,
            where looking into cu_seqlens would wait for the device, see `kernels.checked_values`.
        NotImplementedError: an argument of flash-attn that this function does not support.
    """
    if stream is not None:
        rng_offset = renamed_argument("stream", stream, "rng_offset", rng_offset, 0)
    check_qkv(q, k, v)
    check_boundaries("cu_seqlens_q", cu_seqlens_q, q)
    check_boundaries("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected as many sequences as cu_seqlens_q, {len(cu_seqlens_q) - 1}, "
            f"got {len(cu_seqlens_k) - 1}"
        )
    if plan is not None and cu_seqlens_q is not cu_seqlens_k:
        raise ValueError(
            "plan: is of self-attention; expected one tensor as cu_seqlens_q and cu_seqlens_k"
        )
    options = AttentionOptions.of(
        q,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        block_table,
        seed,
        rng_offset,
    )
    if q.dtype == torch.float64:
        out, lse = _in_float64(q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    else:
        if cu_seqlens_q is cu_seqlens_k and q.shape[0] == k.shape[0]:
            plan = _plan_for(q, cu_seqlens_q, plan)
        sizes = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = _ops.attention(q, k, v, *sizes, *options, *(plan or _NO_PLAN))
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    plan: AttentionPlan | None = None,
    stream: int | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention on one tensor of queries, keys and values; their gradient goes into one, too.

    Args:
        qkv: ``[T, 3, H, D]``, float32, bfloat16, float16 or float64; any strides but a contiguous
            last dimension.
        cu_seqlens: int32 ``[S + 1]``, from 0 ascending to T at most; later rows give zeros.
        max_seqlen: length of the longest sequence, or more.  Of fewer a GPU may leave rows of
            longer ones unwritten.
        dropout_p: as in `flash_attn_varlen_func`, and so are the arguments after it.
        softmax_scale: multiplies the scores, finite; ``D ** -0.5`` when None.
        causal: a query sees only the keys up to its own place.
        window_size: how many keys before and behind it a query sees, two integers; -1 for all.
        softcap: not supported, nor is alibi_slopes.
        alibi_slopes: see softcap.
        deterministic: accepted; the backward pass always is.
        return_attn_probs: return the log-sum-exp too.
        seed: of dropout; int64, one element, on qkv's device.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.
        plan: `kernels.attention_plan` of these boundaries, made once for several calls; None makes
            one where a GPU needs it.
        stream: the old name of ``rng_offset``, deprecated.

    Returns:
        ``[T, H, D]`` in qkv's dtype, or with ``return_attn_probs`` what `flash_attn_varlen_func`
        returns.

    Raises:
        ValueError: as `flash_attn_varlen_func`, and so are the other exceptions.
    """
    if stream is not None:
        rng_offset = renamed_argument("stream", stream, "rng_offset", rng_offset, 0)
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [tokens, 3, heads, width], got {list(qkv.shape)}")
    check_rows("qkv", qkv, qkv)
    check_boundaries("cu_seqlens", cu_seqlens, qkv)
    options = AttentionOptions.of(
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        None,
        seed,
        rng_offset,
    )
    if qkv.dtype == torch.float64:
        check_data(qkv=qkv)
        q, k, v = qkv.unbind(1)
        out, lse = _in_float64(q, k, v, cu_seqlens, cu_seqlens, options)
    else:
        plan = _plan_for(qkv, cu_seqlens, plan)
        arguments = (*options, *(plan or _NO_PLAN))
        out, lse = _ops.attention_qkvpacked(qkv, cu_seqlens, max_seqlen, *arguments)
    return (out, lse, None) if return_attn_probs else out
