"""Check the tensors of the attention functions before a kernel runs."""

import torch
from torch import Tensor

from ..registration import validation


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
