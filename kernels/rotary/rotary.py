"""Rotary position embedding (Su et al., "RoFormer", 2021, arXiv:2104.09864).

The columns of a head are R / 2 pairs and a rest; at position p pair i is rotated by p theta_i::

    theta_i = base ** (-2 i / R)                               cos, sin [N, R / 2], of p theta_i
    y_a = x_a cos - x_b sin,  y_b = x_b cos + x_a sin          (a, b) = (i, i + R / 2)
    dx  = the rotation of dy by -p theta_i                     or, interleaved, (2 i, 2 i + 1)

The columns from R on stay as they are.  A product of a query and a key then depends on their
positions' difference alone.

x is ``[T, H, D]`` packed or ``[B, S, H, D]``, qkv has a dimension of 3 before the heads; the
operators take ``[B, S, G, H, D]``, B = 1 where it is packed, and rotate the first groups of G.
They compute in float32.  A token's position is given, or its place within its sequence plus the
sequence's offset; rows behind the last sequence stay as they are.

In place
========

``superbert::rotary_`` overwrites x and returns nothing, and has a derivative by
`register_inplace_derivative`, which says why.  Nothing of x is kept for the backward pass, which
rotates a copy of the gradient that it is given, since others may hold that.

torch.compile is given a copy that is overwritten, and x that the result is copied to: of a view in
place it would trace the copies that autograd makes of its base's gradient, and Inductor takes both
copies out where x is not used again, so that the kernel writes into x's memory all the same.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (registers the operators)
from ..registration.backend import declare, register_cuda, register_fake
from ..registration.differentiation import (
    check_copied,
    in_forward_mode,
    register_derivative,
    register_inplace_derivative,
)
from ..registration.validation import are_checked
from .rotary_checks import (
    check_apart,
    check_boundaries,
    check_columns,
    check_integers,
    check_operator,
    check_tables,
    check_values,
)

_ops = torch.ops.superbert


# ---- reference ----------------------------------------------------------------------------------


def positions_reference(
    device: torch.device,
    batch: int,
    sequence: int,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seqlen_offsets: Tensor | None,
    offset: int,
) -> Tensor:
    """The position of every token ``[B, S]``, int64; -1 of rows behind the last sequence."""
    if position_ids is not None:
        return position_ids.long().view(batch, sequence)
    place = torch.arange(sequence, device=device)
    if cu_seqlens is None:
        first = offset if seqlen_offsets is None else seqlen_offsets.long()[:, None]
        return place.expand(batch, sequence) + first
    number = torch.bucketize(place, cu_seqlens[1:].long(), right=True)
    inside = number < len(cu_seqlens) - 1
    number = torch.where(inside, number, 0)
    if seqlen_offsets is None:
        first = place.new_full((sequence,), offset)
    else:
        padded = torch.cat([seqlen_offsets.long(), place.new_zeros(1)])
        first = padded[number]
    return torch.where(inside, place - cu_seqlens[number] + first, -1)[None]


def rotary_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotate ``x [..., G, H, D]`` by the angles at ``positions [...]``, in the dtype of x."""
    half = cos.shape[1]
    is_placed = positions >= 0
    rows = torch.where(is_placed, positions, 0)
    if len(cos) == 0:
        return x.clone()
    c, s = (table.to(x.dtype)[rows][..., None, None, :] for table in (cos, sin))
    s = -s if conjugate else s
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.where(is_placed[..., None, None, None], torch.cat((turned, rest), -1), x)


# ---- registration -------------------------------------------------------------------------------

_FUNCTION = "apply_rotary_emb"
_INSTEAD = "torch's operations, or float64"


def _setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any = None) -> None:
    _, cos, sin, position_ids, cu_seqlens, seqlen_offsets, *ctx.numbers = inputs
    ctx.save_for_backward(cos, sin, position_ids, cu_seqlens, seqlen_offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    offset, interleaved, conjugate = ctx.numbers
    saved = _checked_tensors(ctx, grad)
    grad = _with_contiguous_columns(grad)
    return _ops.rotary(grad, *saved, offset, interleaved, not conjugate), *[None] * 8


def _setup_inplace_context(ctx: Any, inputs: tuple[Any, ...]) -> None:
    _setup_context(ctx, inputs)
    ctx.shape = inputs[0].shape


def _inplace_backward(ctx: Any, grad: Tensor) -> Tensor:
    offset, interleaved, conjugate, groups = ctx.numbers
    arguments = (*_checked_tensors(ctx, grad), offset, interleaved, not conjugate)
    shape = grad.shape
    if _is_transformed(grad):  # of a batch of gradients
        heads = grad.reshape(ctx.shape)
        turned = _ops.rotary(heads[:, :, :groups], *arguments)
        return torch.cat((turned, heads[:, :, groups:]), 2).view(shape)
    grad = grad.clone(memory_format=torch.contiguous_format)
    _ops.rotary_(grad.view(ctx.shape), *arguments, groups)
    return grad


def _checked_tensors(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What was saved, none of it and the gradient without memory that torch would copy."""
    saved: tuple[Tensor | None, ...] = ctx.saved_tensors
    if not torch.compiler.is_compiling():
        check_copied(_FUNCTION, (*saved, grad))
    return saved


def _is_transformed(x: Tensor) -> bool:
    """Whether it is a tensor of `torch.func`, or a batch of gradients."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def _with_contiguous_columns(x: Tensor) -> Tensor:
    return x.contiguous() if x.shape[-1] > 1 and x.stride(-1) != 1 else x


@register_fake("rotary")
def _fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@register_fake("rotary_")
def _inplace_fake(*_: object) -> None:
    pass


@register_cuda("rotary")
def _cuda(x: Tensor, *arguments: Any) -> Tensor:
    from . import rotary_triton

    check_operator(x, *arguments[:6])
    out = x.new_empty(x.shape)
    rotary_triton.rotate(x, out, x.shape[2], *arguments)
    return out


@register_cuda("rotary_")
def _inplace_cuda(x: Tensor, *arguments: Any) -> None:
    from . import rotary_triton

    check_operator(x, *arguments[:6])
    *others, groups = arguments
    if not 0 <= groups <= x.shape[2]:
        raise ValueError(f"groups: expected at most x's {x.shape[2]}, got {groups}")
    check_apart("x", x)
    rotary_triton.rotate(x, x, groups, *others)


for _name in ("rotary", "rotary_"):
    declare(_name, cpu="cpp", cuda="triton")
register_derivative("rotary", _backward, _setup_context, name=_FUNCTION, instead=_INSTEAD)
register_inplace_derivative(
    "rotary_", _inplace_backward, _setup_inplace_context, name=_FUNCTION, instead=_INSTEAD
)


# ---- public -------------------------------------------------------------------------------------


class _Rotation(NamedTuple):
    """The arguments of the operators besides x: tables, positions, options."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    seqlen_offsets: Tensor | None
    offset: int
    interleaved: bool
    conjugate: bool = False

    @classmethod
    def of(
        cls,
        heads: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool,
        seqlen_offsets: int | Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        position_ids: Tensor | None,
        is_packed: bool,
    ) -> "_Rotation":
        """Check what the public functions are given for ``heads [B, S, G, H, D]``."""
        check_tables(cos, sin, heads)
        batch, sequence = heads.shape[:2]
        offsets = seqlen_offsets if isinstance(seqlen_offsets, Tensor) else None
        offset = 0 if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
        sequences = batch
        if position_ids is not None:
            if cu_seqlens is not None or offsets is not None or offset != 0:
                raise ValueError(
                    "position_ids: with them, expected neither cu_seqlens nor seqlen_offsets"
                )
            shape = (sequence,) if is_packed else (batch, sequence)
            check_integers("position_ids", position_ids, shape, heads.device)
            position_ids = position_ids.reshape(-1)
        elif cu_seqlens is not None:
            check_boundaries(cu_seqlens, heads)
            sequences = len(cu_seqlens) - 1
        if offsets is not None:
            check_integers("seqlen_offsets", offsets, (sequences,), heads.device)
        longest = max_seqlen if is_packed else sequence
        if position_ids is None and offsets is None and longest is not None and longest > 0:
            name = "max_seqlen" if is_packed else "seqlen_offsets"
            if not (offset >= 0 and offset + longest <= len(cos)):
                raise ValueError(
                    f"{name}: expected sequences within the {len(cos)} rows of cos, got {longest} "
                    f"tokens from {offset} on"
                )
        places: Any = (position_ids, cu_seqlens, offsets, offset)
        if heads.dtype == torch.float64:
            if are_checked(heads):
                check_values(len(cos), batch * sequence, sequence, *places)
        else:
            cos, sin = cos.float(), sin.float()
        return cls(cos, sin, position_ids, cu_seqlens, offsets, offset, bool(interleaved))

    def by_reference(self, heads: Tensor) -> Tensor:
        """Rotate ``[B, S, G, H, D]`` by torch's operations."""
        places = (self.position_ids, self.cu_seqlens, self.seqlen_offsets, self.offset)
        positions = positions_reference(heads.device, heads.shape[0], heads.shape[1], *places)
        return rotary_reference(heads, self.cos, self.sin, positions, self.interleaved)

    def rotated(self, heads: Tensor) -> Tensor:
        """Return the rotation of ``[B, S, G, H, D]``."""
        if heads.dtype == torch.float64:
            return self.by_reference(heads)
        out: Tensor = _ops.rotary(heads, *self)
        return out

    def rotate_(self, x: Tensor, heads: Tensor, groups: int) -> Tensor:
        """Rotate the first groups of ``heads [B, S, G, H, D]``, a view of x; return x or a view."""
        part = heads[:, :, :groups]
        if heads.dtype == torch.float64 or _is_transformed(heads) or in_forward_mode():
            part.copy_(self.rotated(part))
            return x
        if torch.compiler.is_compiling():
            copy = x.clone(memory_format=torch.contiguous_format)
            _ops.rotary_(copy.view(heads.shape), *self, groups)
            x.copy_(copy)
            return copy
        needs_graph = x.requires_grad and torch.is_grad_enabled()
        _ops.rotary_(heads, *self, groups)
        base = x._base
        if needs_graph and base is not None and base.is_contiguous() and x.is_contiguous():
            # The base was overwritten: a view of its new value has a shorter graph than x.
            return base.view(x.shape) if base.numel() == x.numel() else x
        return x


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    *,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotary position embedding, with the arguments of flash-attn's function of that name.

    Args:
        x: ``[B, S, H, D]``, or packed ``[T, H, D]`` with cu_seqlens or position_ids; float32,
            bfloat16, float16 or float64; any strides but a contiguous last dimension.
        cos: ``[N, R / 2]`` by position, ``R <= D``, on x's device; taken in float32, or in float64
            where x is.  It has no gradient.
        sin: like ``cos``; `kernels.rotary_tables` computes both.
        interleaved: pairs are columns 2i and 2i + 1, not i and i + R / 2.
        inplace: overwrite x.
        seqlen_offsets: position of the first token of each sequence: of all, or int32 or int64
            ``[sequences]``.
        cu_seqlens: int32 ``[sequences + 1]``, from 0 ascending to T at most; later rows stay as
            they are.
        max_seqlen: length of the longest sequence; where it is given, it is checked to fit into the
            tables.
        position_ids: int32 or int64 ``[T]``, or ``[B, S]``: the position of each token, in place of
            cu_seqlens and offsets.

    Returns:
        A contiguous tensor of x's shape and dtype.  With ``inplace`` x, or another view of the same
        memory where x is a view: use what is returned, whose gradient needs no copy as that of the
        old view does.  Under `torch.compile` it is a tensor of its own, and x has its values.

    Raises:
        TypeError: a tensor is none.
        ValueError: a shape, dtype, device or range that does not fit, or a position outside of the
            tables; the message names it.  On CUDA tensors, where looking at positions would wait
            for the device, see `kernels.checked_values`; without it, rows whose position is outside
            of the tables stay as they are.
        NotImplementedError: a table that requires a gradient.
        RuntimeError: in place on a leaf that requires a gradient.
    """
    check_columns("x", x)
    is_packed = cu_seqlens is not None or (position_ids is not None and x.dim() == 3)
    if x.dim() != (3 if is_packed else 4):
        expected = "[tokens, heads, width]" if is_packed else "[batch, sequence, heads, width]"
        reason = "" if is_packed else " without cu_seqlens or position_ids"
        raise ValueError(f"x: expected {expected}{reason}, got {list(x.shape)}")
    heads = x[None, :, None] if is_packed else x[:, :, None]
    places = (seqlen_offsets, cu_seqlens, max_seqlen, position_ids, is_packed)
    rotation = _Rotation.of(heads, cos, sin, interleaved, *places)
    if inplace:
        return rotation.rotate_(x, heads, 1)
    return rotation.rotated(heads).view(x.shape)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Rotate queries and keys in place, and leave the values alone: flash-attn's function.

    One pass over q and k, without a second qkv; the backward pass copies the gradient once.

    Args:
        qkv: ``[B, S, 3, H, D]``, or packed ``[T, 3, H, D]`` with cu_seqlens or position_ids; dtypes
            and strides as of `apply_rotary_emb`'s x.  With ``num_heads_q`` all heads are in one
            dimension, queries, keys, values: ``[B, S, heads, D]`` or ``[T, heads, D]``.
        cos: ``[N, R / 2]``, as in `apply_rotary_emb`, and so are interleaved and all arguments that
            say where tokens are.
        sin: like cos.
        cos_k: not supported, nor is sin_k.
        sin_k: see cos_k.
        interleaved: see cos.
        seqlen_offsets: see cos.
        num_heads_q: heads of queries; those of keys are half of the others.
        cu_seqlens: see cos.
        max_seqlen: see cos.
        position_ids: see cos.

    Returns:
        qkv, or another view of its memory, as `apply_rotary_emb` in place.

    Raises:
        ValueError: as `apply_rotary_emb`, and so are the other exceptions.
        NotImplementedError: tables of the keys' own, too.
    """
    for name, table in (("cos_k", cos_k), ("sin_k", sin_k)):
        if table is not None:
            raise NotImplementedError(f"{name}: not supported by this rotary embedding")
    check_columns("qkv", qkv)
    dims = 4 if num_heads_q is None else 3
    is_packed = cu_seqlens is not None or (position_ids is not None and qkv.dim() == dims)
    layout = "3, heads" if num_heads_q is None else "heads"
    expected = f"[tokens, {layout}, width]" if is_packed else f"[batch, sequence, {layout}, width]"
    if qkv.dim() != dims + (not is_packed):
        reason = "" if is_packed else " without cu_seqlens or position_ids"
        raise ValueError(f"qkv: expected {expected}{reason}, got {list(qkv.shape)}")
    heads = qkv[None] if is_packed else qkv
    if num_heads_q is None:
        if heads.shape[2] != 3:
            raise ValueError(f"qkv: expected {expected}, got {list(qkv.shape)}")
        groups = 2
    else:
        others = heads.shape[2] - num_heads_q
        if num_heads_q < 0 or others < 0 or others % 2:
            raise ValueError(
                f"num_heads_q: expected an even number of the {heads.shape[2]} heads left for keys "
                f"and values, got {num_heads_q}"
            )
        heads, groups = heads[:, :, :, None], num_heads_q + others // 2
    places = (seqlen_offsets, cu_seqlens, max_seqlen, position_ids, is_packed)
    return _Rotation.of(heads, cos, sin, interleaved, *places).rotate_(qkv, heads, groups)
