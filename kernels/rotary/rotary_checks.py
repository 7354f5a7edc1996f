"""Check the arguments of rotary embeddings, of the public functions and of the operators.

All raise ValueError, and name the argument (kernels/registration/validation.py).  The C++ operators
check for themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registration.validation import (
    check_cu_seqlens,
    check_data,
    check_index,
    check_input,
    check_kernel_dtype,
    may_look,
)

INTEGERS = (torch.int32, torch.int64)
MAX_WIDTH = 1024
"""Columns of a head that the GPU's kernel holds in registers."""


def check_columns(name: str, x: Tensor) -> None:
    """Check rows with contiguous columns."""
    check_input(name, x)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {x.stride()}")


def check_tables(cos: Tensor, sin: Tensor, x: Tensor) -> None:
    """Check tables ``[N, R / 2]`` for ``x [..., D]``."""
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(table).__name__}")
        if table.dim() != 2 or table.shape != cos.shape:
            raise ValueError(
                f"{name}: expected [positions, rotary width / 2], the same as sin and cos, "
                f"got {list(table.shape)}"
            )
        if not table.is_floating_point():
            raise ValueError(f"{name}: expected a floating dtype, got {table.dtype}")
        if table.device != x.device:
            raise ValueError(f"{name}: expected on {x.device}, got {table.device}")
        if table.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError(f"{name}: has no gradient here; give {name}.detach()")
    half, width = cos.shape[1], x.shape[-1]
    if not 0 < 2 * half <= width:
        raise ValueError(
            f"cos: expected 1 to {width // 2} columns for heads of {width} columns, got {half}"
        )
    check_data(cos=cos, sin=sin)


def check_integers(name: str, x: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Check int64 or int32 of a shape."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in INTEGERS or x.shape != tuple(shape):
        raise ValueError(
            f"{name}: expected int64 or int32 {list(shape)}, got {x.dtype} {list(x.shape)}"
        )
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, got {x.device}")
    check_data(**{name: x})


def check_boundaries(cu_seqlens: Tensor, x: Tensor) -> None:
    """Check dtype, shape and device of boundaries of a stream on the device of ``x``."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens: expected a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            "cu_seqlens: expected int32 [sequences + 1], "
            f"got {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens: expected on {x.device}, got {cu_seqlens.device}")
    check_data(cu_seqlens=cu_seqlens)


def check_values(
    count: int,
    total: int,
    sequence: int,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seqlen_offsets: Tensor | None,
    offset: int,
) -> None:
    """Look at positions, and wait for them: all have to be rows of tables of ``count``.

    Args:
        count: rows of cos and sin.
        total: tokens.
        sequence: tokens of a batch entry.
        position_ids: as the operators', and so are the others.
        cu_seqlens: see position_ids.
        seqlen_offsets: see position_ids.
        offset: see position_ids.
    """
    if position_ids is not None:
        check_index("position_ids", position_ids, count)
        return
    lengths = [sequence] * (total // sequence if sequence else 0)
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens", cu_seqlens, total)
        lengths = cu_seqlens.diff().tolist()
    firsts = [offset] * len(lengths) if seqlen_offsets is None else seqlen_offsets.tolist()
    for number, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        if length and not (first >= 0 and first + length <= count):
            raise ValueError(
                f"seqlen_offsets: expected to end within the {count} rows of cos, got sequence "
                f"{number}, {length} tokens from {first} on"
            )


def check_operator(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seqlen_offsets: Tensor | None,
    offset: int,
) -> None:
    """Check the arguments of the operators on a GPU; their values where they may be looked at."""
    check_kernel_dtype("x", x)
    if x.dim() != 5:
        raise ValueError(
            f"x: expected [batch, sequence, groups, heads, width], got {list(x.shape)}"
        )
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"x: expected a contiguous last dimension, got strides {x.stride()}")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x: expected heads of at most {MAX_WIDTH} columns, got {x.shape[-1]}")
    check_data(x=x)
    check_tables(cos.detach(), sin.detach(), x)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32:
            raise ValueError(f"{name}: expected float32, got {table.dtype}")
    batch, sequence = x.shape[:2]
    sequences = batch
    if position_ids is not None:
        if cu_seqlens is not None or seqlen_offsets is not None or offset != 0:
            raise ValueError(
                "position_ids: with them, expected neither cu_seqlens nor seqlen_offsets"
            )
        check_integers("position_ids", position_ids, (batch * sequence,), x.device)
    if cu_seqlens is not None:
        if batch != 1:
            raise ValueError("cu_seqlens: expected with a packed x alone")
        check_boundaries(cu_seqlens, x)
        sequences = len(cu_seqlens) - 1
    if seqlen_offsets is not None:
        check_integers("seqlen_offsets", seqlen_offsets, (sequences,), x.device)
    if may_look(x):
        places = (position_ids, cu_seqlens, seqlen_offsets, offset)
        check_values(len(cos), batch * sequence, sequence, *places)


def check_apart(name: str, x: Tensor) -> None:
    """Refuse a tensor to be written two elements of which may be one."""
    if x.numel() == 0:
        return
    reach = 0
    pairs = zip(x.stride(), x.shape, strict=True)
    for stride, size in sorted(pair for pair in pairs if pair[1] > 1):
        if stride <= reach:
            raise ValueError(f"{name}: written in place, expected elements that lie apart")
        reach += stride * (size - 1)
