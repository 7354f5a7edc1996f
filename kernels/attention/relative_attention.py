"""Self-attention with a learnt bias for the distance of query and key, over packed sequences.

    S_ij = softmax_scale * q_i . k_j + bias[place of j - place of i]          for each head
    dbias[d] = sum of dS_ij over the i, j with place of j - place of i = d

as T5 has it (Raffel et al. 2020, arXiv:1910.10683, section 2.1) and, in BERT's shape, MPNet (Song
et al. 2020, arXiv:2004.09297).  All else is as in attention.py, whose kernels these are.  A table
of one number for each head and distance is all that is read and written: the matrix of biases that
padded tensors need, as large as the scores, is never made, and neither is its gradient.  The
gradients of the sequences are summed in their order, so that they repeat to the bit.

On a CPU alone: a GPU has no kernel for it yet.
"""

from typing import Any

import torch
from torch import Tensor

from ..registration.backend import declare, register_fake
from ..registration.differentiation import differentiable_once, refuse_vmap, register_derivative
from ..registration.validation import check_data
from .attention import attention_reference, packed_forward_fake
from .attention_checks import check_boundaries, check_rows
from .attention_options import AttentionOptions
from .attention_plan import AttentionPlan

_ops = torch.ops.superbert


# ---- reference ----------------------------------------------------------------------------------


def relative_attention_reference(
    qkv: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    options: AttentionOptions,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp by whole score matrices, in the dtype of qkv.

    Args:
        qkv: ``[T, 3, H, D]``.
        bias: ``[H, 2 N - 1]``, any floating dtype.
        cu_seqlens: ``[S + 1]``.
        options: what to compute.
        factors: dropout factors ``[H, T, T]``, in place of those that the options say.
    """
    q, k, v = qkv.unbind(1)
    place = torch.arange(len(qkv), device=qkv.device)
    largest = bias.shape[1] // 2
    # Places of other sequences may be farther apart; nobody sees them.
    distance = (place - place[:, None]).clamp(-largest, largest)
    added = bias[:, distance + largest].to(qkv.dtype)
    return attention_reference(q, k, v, cu_seqlens, cu_seqlens, options, factors, added)


# ---- registration -------------------------------------------------------------------------------


def _backward_fake(
    _grad_out: Tensor, qkv: Tensor, bias: Tensor, *_: object
) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    without_plan = inputs[: 4 + len(AttentionOptions._fields)]
    qkv, bias, cu_seqlens, *ctx.numbers, seed = without_plan
    out, lse = output
    ctx.save_for_backward(qkv, bias, out, lse, cu_seqlens, seed)
    ctx.mark_non_differentiable(lse)


_NAME, _INSTEAD = "relative_attention", "float64"
_NO_GRADIENTS = (None,) * (2 + len(AttentionOptions._fields) + len(AttentionPlan._fields))


@differentiable_once(_NAME, _INSTEAD)
def _backward(
    ctx: Any, saved: tuple[Tensor, ...], grad_out: Tensor, _grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    *tensors, seed = saved
    grads = _ops.relative_attention_backward(grad_out, *tensors, *ctx.numbers, seed)
    return *grads, *_NO_GRADIENTS


register_fake("relative_attention")(packed_forward_fake)
register_fake("relative_attention_backward")(_backward_fake)
for _operator in ("relative_attention", "relative_attention_backward"):
    declare(_operator, cpu="cpp", cuda=None)
register_derivative("relative_attention", _backward, _setup_context, name=_NAME, instead=_INSTEAD)
refuse_vmap("relative_attention_backward", name=_NAME, instead=_INSTEAD)


# ---- public -------------------------------------------------------------------------------------


def relative_attention(
    qkv: Tensor,
    bias: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    *,
    seed: Tensor | None = None,
    rng_offset: int = 0,
) -> Tensor:
    """Self-attention whose scores get a number for each head and distance, on a CPU.

    Args:
        qkv: ``[T, 3, H, D]``, float32, bfloat16, float16 or float64; any strides but a contiguous
            last dimension.
        bias: float32 (or float64 where qkv is) ``[H, 2 N - 1]`` with N at least the tokens of the
            longest sequence; column ``N - 1 + d`` is added where the key stands d places behind the
            query.
        cu_seqlens: int32 ``[S + 1]``, from 0 ascending to T at most; later rows give zeros.
        max_seqlen: length of the longest sequence, or more.
        dropout_p: probability to drop an attention weight; 0 outside training.
        softmax_scale: multiplies the products of queries and keys, finite; ``D ** -0.5`` when None.
        seed: of dropout; int64, one element.  None draws one.
        rng_offset: distinguishes dropouts that share a seed.

    Returns:
        ``[T, H, D]`` in qkv's dtype.

    Raises:
        ValueError: wrong shapes, dtypes or devices, or a bias that does not reach over the longest
            sequence.
        NotImplementedError: on a GPU, and where derivatives of derivatives are asked for.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [tokens, 3, heads, width], got {list(qkv.shape)}")
    check_rows("qkv", qkv, qkv)
    check_boundaries("cu_seqlens", cu_seqlens, qkv)
    _check_bias(bias, qkv)
    options = AttentionOptions.of(
        *(qkv, dropout_p, softmax_scale, False, (-1, -1), 0.0, None, None, seed, rng_offset)
    )
    if qkv.is_cuda:
        raise NotImplementedError("relative_attention: has no kernel for a GPU")
    if qkv.dtype == torch.float64:
        check_data(qkv=qkv, bias=bias)
        _check_reach(bias, cu_seqlens)
        return relative_attention_reference(qkv, bias, cu_seqlens, options)[0]
    out: Tensor = _ops.relative_attention(qkv, bias, cu_seqlens, max_seqlen, *options)[0]
    return out


def _check_bias(bias: Tensor, qkv: Tensor) -> None:
    if bias.dim() != 2 or bias.shape[0] != qkv.shape[2] or bias.shape[1] % 2 == 0:
        raise ValueError(
            f"bias: expected [{qkv.shape[2]}, an odd number of distances], got {list(bias.shape)}"
        )
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    if bias.dtype != dtype or bias.device != qkv.device:
        raise ValueError(
            f"bias: expected {dtype} on {qkv.device}, got {bias.dtype} on {bias.device}"
        )


def _check_reach(bias: Tensor, cu_seqlens: Tensor) -> None:
    longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    if longest > bias.shape[1] // 2 + 1:
        raise ValueError(
            f"bias: expected distances up to {longest - 1} to both sides, got {bias.shape[1] // 2}"
        )
