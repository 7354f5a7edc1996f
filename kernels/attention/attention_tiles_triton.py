"""Tiles of packed streams in Triton: what the kernels of attention load, store and are given."""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..dropout.philox_triton import DropoutArguments
from .attention_options import AttentionOptions

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

MAX_WIDTH = 128


class Heads(NamedTuple):
    """A packed stream ``[T, H, D]``: its data and the strides of rows and heads."""

    data: Any
    row: int
    head: int

    @classmethod
    def of(cls, x: Tensor) -> "Heads":
        """The stream as a kernel argument."""
        return cls(x, x.stride(0), x.stride(1))


class KernelOptions(NamedTuple):
    """The part of `AttentionOptions` that the kernels take.

    Of each value that is None the code is left out.  ``rng_offset`` and `Limits` are arguments of
    their own, since Triton would compile anew for some integers in a tuple.

    Attributes:
        scale: multiplies the scores.
        seed: of dropout, whose arguments (`DropoutArguments`) these three are; None without it.
        threshold: see seed.
        keep_scale: see seed.
    """

    scale: Any
    seed: Any
    threshold: Any
    keep_scale: Any

    @classmethod
    def of(cls, options: AttentionOptions) -> "KernelOptions":
        """The options as a kernel argument."""
        seed = options.seed if options.dropout_p > 0 else None
        return cls(options.softmax_scale, *DropoutArguments.of(options.dropout_p, seed))


class Limits(NamedTuple):
    """The window of `AttentionOptions`, as the rows that a kernel's rows meet.

    Attributes:
        before: how many rows before its own place a row meets; None where there is no window.
        after: how many behind it.
    """

    before: int | None
    after: int | None

    @classmethod
    def of(cls, options: AttentionOptions, *, rows_are_keys: bool = False) -> "Limits":
        """The limits of queries, or of keys, which are seen from the other side."""
        limits = options.limits()
        if limits is None:
            return cls(None, None)
        return cls(*reversed(limits)) if rows_are_keys else cls(*limits)


def padded_width(width: int) -> int:
    """Columns of a tile for heads of ``width``, a power of two."""
    padded: int = max(32, triton.next_power_of_2(width))
    return padded


@triton.jit
def load_bounds(bounds, rows, total, inside):
    """``bounds [2, total]`` of the rows that are ``inside``, zeros in place of the others."""
    first = tl.load(bounds + rows, mask=inside, other=0)
    last = tl.load(bounds + total + rows, mask=inside, other=0)
    return first, last


@triton.jit
def limited(first, last, place, before, after):
    """Cut intervals off so far before and after a place, at one of their ends where none is left.

    As they are where ``before`` is None.  Rows and limits have 31 bits, of which differences do not
    overflow, as sums would.
    """
    if before is not None:
        start = tl.maximum(first - place, -before) + place
        stop = tl.minimum(last - place, after + 1) + place
        first = tl.minimum(start, last)
        last = tl.maximum(stop, first)
    return first, last


@triton.jit
def _tile_pointers(x, head, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    mask = inside[:, None]
    if BLOCK_D > D:
        mask &= (d < D)[None, :]
    base = x.data + head.to(tl.int64) * x.head
    return base + rows.to(tl.int64)[:, None] * x.row + d[None, :], mask


@triton.jit
def load_tile(x, head, rows, inside, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows that are ``inside``, zeros in place of the others."""
    pointers, mask = _tile_pointers(x, head, rows, inside, D, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(x, head, rows, inside, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the rows that are ``inside``."""
    pointers, mask = _tile_pointers(x, head, rows, inside, D, BLOCK_D)
    tl.store(pointers, values.to(x.data.dtype.element_ty), mask=mask)


@triton.jit
def load_row_numbers(numbers, head, rows, total, inside):
    """Of ``numbers [H, total]`` the rows that are ``inside``, zeros in place of the others."""
    pointers = numbers + head.to(tl.int64) * total + rows
    return tl.load(pointers, mask=inside, other=0.0)


@triton.jit
def store_row_numbers(numbers, head, rows, total, inside, values):
    """Write the rows that are ``inside``."""
    pointers = numbers + head.to(tl.int64) * total + rows
    tl.store(pointers, values, mask=inside)
