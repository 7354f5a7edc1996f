"""Check the tensors of the attention functions, and of the operators whose CUDA side is Python.

All raise ValueError, and name the argument (kernels/registration/validation.py).
"""

import torch
from torch import Tensor

from ..dropout.dropout import check_seed_given
from ..registration import validation
from .attention_options import AttentionOptions


def check_rows(name: str, x: Tensor, like: Tensor) -> None:
    """Check dtype, device, heads and width of ``x [..., H, D]`` against those of ``like``."""
    if x.dtype not in validation.DTYPES or x.dtype != like.dtype:
        raise ValueError(f"{name}: expected a floating dtype, the same for q, k, v; got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected on {like.device}, got {x.device}")
    if x.shape[-2:] != like.shape[-2:]:
        raise ValueError(
            f"{name}: expected heads and width {list(like.shape[-2:])} as in q, "
            f"got {list(x.shape[-2:])} (fewer key heads than query heads are not supported)"
        )
    if x.shape[-1] == 0:
        raise ValueError(f"{name}: expected heads of at least one column, got {list(x.shape)}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {x.stride()}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check three streams ``[T, H, D]`` against each other."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(f"{name}: expected [tokens, heads, width], got {list(x.shape)}")
        check_rows(name, x, q)
    if k.shape != v.shape:
        raise ValueError(f"v: expected the shape of k {list(k.shape)}, got {list(v.shape)}")


def check_boundaries(name: str, cu_seqlens: Tensor, rows: Tensor) -> None:
    """Check boundaries against the stream ``rows [T, ...]`` that they divide.

    Their values are checked by the C++ code for CPU tensors, here for the float64 reference, and
    on CUDA when `kernels.checked_values` asks for it.
    """
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"{name}: expected int32 [sequences + 1], got {cu_seqlens.dtype} "
            f"{list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != rows.device or not cu_seqlens.is_contiguous():
        raise ValueError(f"{name}: expected contiguous on {rows.device}, got {cu_seqlens.device}")
    if validation.are_checked(rows):
        validation.check_cu_seqlens(name, cu_seqlens, len(rows))


def check_longest(cu_seqlens: Tensor, max_seqlen: int) -> None:
    """Check that no sequence is longer than said, where values on a GPU may be looked at."""
    if not (cu_seqlens.is_cuda and validation.may_look(cu_seqlens)) or len(cu_seqlens) == 1:
        return
    longest = int(cu_seqlens.diff().max())
    if longest > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least the longest, {longest}, got {max_seqlen}")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> None:
    """Check what both passes of attention are given."""
    validation.check_kernel_dtype("q", q)
    check_qkv(q, k, v)
    validation.check_data(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_boundaries("cu_seqlens_q", cu_seqlens_q, q)
    check_boundaries("cu_seqlens_k", cu_seqlens_k, k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError("cu_seqlens_k: expected as many sequences as cu_seqlens_q")
    options.check(q.device)
    check_seed_given(options.dropout_p, options.seed)


def check_attention_backward(grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor) -> None:
    """Check what the backward pass is given besides."""
    for name, x in (("grad_out", grad_out), ("out", out)):
        validation.check_tensor(name, x, q.shape, q.dtype, q.device)
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(f"out: expected a contiguous last dimension, got strides {out.stride()}")
    validation.check_tensor("lse", lse, (q.shape[1], q.shape[0]), torch.float32, q.device)


def check_packed(qkv: Tensor) -> None:
    """Check the shape of one tensor of queries, keys and values."""
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv: expected [tokens, 3, heads, width], got {list(qkv.shape)}")
    validation.check_data(qkv=qkv)
