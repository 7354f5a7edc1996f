"""Rotary position embedding on the GPU; `kernels.rotary.rotary` has the maths.

A program rotates PAIRS pairs: some heads of some neighbouring tokens, whose columns it reads whole
before it writes them, so that ``out`` may be ``x``.  Positions are looked up, or found among the
boundaries of the sequences, on the device; a row without one, behind the last sequence or outside
of the tables, stays as it is.
"""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# mypy: allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..attention.attention_plan_triton import sequences_that_end_behind

PAIRS = 1024
NUM_WARPS = 4


class Strides(NamedTuple):
    """Elements from one token, group and head to the next."""

    token: Any
    group: Any
    head: Any

    @classmethod
    def of(cls, x: Tensor) -> "Strides":
        """Those of ``x [B, S, G, H, D]``."""
        return cls(*x.stride()[1:4])


class Places(NamedTuple):
    """Where the positions come from; a pointer that is not read is any other.

    Attributes:
        position_ids: of the tokens ``[B * S]``.
        cu_seqlens: boundaries ``[sequences + 1]`` of a packed stream, int32.
        seqlen_offsets: the first position of each sequence.
    """

    position_ids: Any
    cu_seqlens: Any
    seqlen_offsets: Any


@triton.jit
def _positions(
    token,
    is_token,
    sequence,
    places,
    offset,
    num_sequences,
    search_steps,
    KIND: tl.constexpr,
    OFFSETS: tl.constexpr,
):
    """The positions of tokens (int64), -1 of those behind the last sequence."""
    if KIND == "ids":
        position = tl.load(places.position_ids + token, mask=is_token, other=-1).to(tl.int64)
    else:
        if KIND == "packed":
            row = token.to(tl.int32)
            number = sequences_that_end_behind(
                row, tl.zeros_like(row), places.cu_seqlens, num_sequences, search_steps
            )
            inside = is_token & (number < num_sequences)
            begin = tl.load(places.cu_seqlens + number, mask=inside, other=0)
            inside = inside & (begin <= row)
            place = (row - begin).to(tl.int64)
        else:
            number, inside, place = token // sequence, is_token, token % sequence
        if OFFSETS:
            first = tl.load(places.seqlen_offsets + number, mask=inside, other=0).to(tl.int64)
        else:
            first = tl.zeros_like(place) + offset
        position = tl.where(inside & (first >= 0), first + place, -1)
    return position


_NUMBERS = [
    *("total", "sequence", "positions", "heads", "of_token", "x_batch", "out_batch"),
    *("offset", "num_sequences", "search_steps"),
]


@triton.jit(do_not_specialize=_NUMBERS)
def rotary_kernel(
    x,  # [B, S, G, H, D]
    cos,  # [positions, HALF]
    sin,
    out,  # like x
    x_strides,
    out_strides,
    places,
    total,  # tokens, B * S
    sequence,  # S
    positions,
    heads,  # H
    of_token,  # heads that are rotated of a token, in all groups
    x_batch,  # elements from one batch entry to the next
    out_batch,
    offset,  # the first position of every sequence
    num_sequences,  # of cu_seqlens
    search_steps,  # halvings that leave one of num_sequences + 1 places
    sign,  # of the angle
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    OFFSETS: tl.constexpr,
    COPY: tl.constexpr,  # out is another tensor: write, too, what stays as it is
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotate ROWS heads, counted through the tokens."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, of_heads = row // of_token, (row % of_token).to(tl.int32)
    is_token = token < total
    position = _positions(
        token, is_token, sequence, places, offset, num_sequences, search_steps, KIND, OFFSETS
    )
    is_placed = is_token & (position >= 0) & (position < positions)

    batch, place = token // sequence, token % sequence
    group, head = (of_heads // heads).to(tl.int64), (of_heads % heads).to(tl.int64)
    own = x + (batch * x_batch + place * x_strides.token)
    own += group * x_strides.group + head * x_strides.head
    to = out + (batch * out_batch + place * out_strides.token)
    to += group * out_strides.group + head * out_strides.head

    pair = tl.arange(0, BLOCK_HALF)[None, :]
    angles = position[:, None] * HALF + pair
    has_angle = is_placed[:, None] & (pair < HALF)
    c = tl.load(cos + angles, mask=has_angle, other=1.0)
    s = tl.load(sin + angles, mask=has_angle, other=0.0) * sign
    written = is_token if COPY else is_placed
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = written[:, None] & (column < 2 * HALF)
        values = tl.load(own[:, None] + column, mask=mask, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(values, [ROWS, BLOCK_HALF, 2]))
        turned = tl.interleave(first * c - second * s, second * c + first * s)
        if COPY:
            turned = tl.where(is_placed[:, None], turned, values)
        tl.store(to[:, None] + column, turned.to(out.dtype.element_ty), mask=mask)
    else:
        mask = written[:, None] & (pair < HALF)
        first = tl.load(own[:, None] + pair, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(own[:, None] + HALF + pair, mask=mask, other=0.0).to(tl.float32)
        turned_first, turned_second = first * c - second * s, second * c + first * s
        if COPY:
            turned_first = tl.where(is_placed[:, None], turned_first, first)
            turned_second = tl.where(is_placed[:, None], turned_second, second)
        tl.store(to[:, None] + pair, turned_first.to(out.dtype.element_ty), mask=mask)
        tl.store(to[:, None] + HALF + pair, turned_second.to(out.dtype.element_ty), mask=mask)
    if COPY and WIDTH > 2 * HALF:
        rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = is_token[:, None] & (rest < WIDTH)
        tl.store(to[:, None] + rest, tl.load(own[:, None] + rest, mask=mask), mask=mask)


def constants_of(width: int, half: int) -> dict[str, int]:
    """The kernel's constants for heads of ``width`` columns of which ``2 * half`` are rotated."""
    return {
        "WIDTH": width,
        "HALF": half,
        "BLOCK_HALF": triton.next_power_of_2(max(half, 1)),
        "BLOCK_REST": triton.next_power_of_2(max(width - 2 * half, 1)),
        "ROWS": max(1, 2 * PAIRS // triton.next_power_of_2(width)),
    }


def rotate(
    x: Tensor,
    out: Tensor,
    groups: int,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    seqlen_offsets: Tensor | None,
    offset: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Rotate the first ``groups`` groups of ``x [B, S, G, H, D]`` into those of ``out``."""
    batch, sequence, _, heads, width = x.shape
    tokens, of_token = batch * sequence, groups * heads
    if tokens * of_token * width == 0:
        return
    num_sequences = 0 if cu_seqlens is None else len(cu_seqlens) - 1
    places = Places(
        cos if position_ids is None else position_ids.contiguous(),
        cos if cu_seqlens is None else cu_seqlens.contiguous(),
        cos if seqlen_offsets is None else seqlen_offsets.contiguous(),
    )
    kind = "ids" if position_ids is not None else "packed" if cu_seqlens is not None else "batch"
    positions, half = cos.shape
    constants = constants_of(width, half)
    rotary_kernel[(triton.cdiv(tokens * of_token, constants["ROWS"]),)](
        *(x, cos.contiguous(), sin.contiguous(), out, Strides.of(x), Strides.of(out), places),
        *(tokens, sequence, positions, heads, of_token, x.stride(0), out.stride(0)),
        *(offset, num_sequences, num_sequences.bit_length(), -1.0 if conjugate else 1.0),
        INTERLEAVED=interleaved,
        KIND=kind,
        OFFSETS=seqlen_offsets is not None,
        COPY=out is not x,
        **constants,
        num_warps=NUM_WARPS,
    )
