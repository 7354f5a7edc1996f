"""Dropout factors inside Triton kernels; `kernels.dropout` says what they are."""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class DropoutArguments(NamedTuple):
    """Dropout arguments of a kernel, besides the RNG offset.

    Attributes:
        seed: pointer to one int64.
        threshold: an element whose word lies below is dropped.
        keep_scale: ``1 / (1 - p)``.
    """

    seed: Any
    threshold: int
    keep_scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> "DropoutArguments":
        """The arguments for a drop probability of ``p``; without dropout the seed is not read."""
        return cls(seed, int(p * 2**32), 1 / (1 - p))


@triton.jit
def _words(low, high, head, rng_offset, dropout):
    """The four random words of quads."""
    zero = tl.zeros_like(low)
    third, fourth = zero + tl.cast(head, tl.uint32), zero + tl.cast(rng_offset, tl.uint32)
    return tl.philox(tl.load(dropout.seed), low, high, third, fourth)


@triton.jit
def _keep_factors(words, dropout):
    # The threshold comes as an int of 32 or 64 bits.
    return tl.where(words >= tl.cast(dropout.threshold, tl.uint32), dropout.keep_scale, 0.0)


@triton.jit
def _quad_factors(low, high, head, rng_offset, dropout):
    """Factors of the quads ``[..., n]`` in the order of their elements: ``[..., 4 n]``."""
    w0, w1, w2, w3 = _words(low, high, head, rng_offset, dropout)
    return _keep_factors(tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)), dropout)


@triton.jit
def element_factors(first, rng_offset, dropout, COUNT: tl.constexpr):
    """Factors of COUNT elements from ``first [...]`` (int64) on: ``[..., COUNT]``.

    ``first`` and COUNT are multiples of 4.
    """
    quad = first[:, None] // 4 + tl.arange(0, COUNT // 4)[None, :]
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
    return _quad_factors(low, high, 0, rng_offset, dropout)


@triton.jit
def scattered_factors(elements, rng_offset, dropout):
    """Factors of any ``elements`` (int64), at the price of a Philox call for each."""
    quad = elements // 4
    low, high = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
    w0, w1, w2, w3 = _words(low, high, 0, rng_offset, dropout)
    word = elements % 4
    words = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    return _keep_factors(words, dropout)


@triton.jit
def attention_factors(queries, first_key, head, rng_offset, dropout, KEYS: tl.constexpr):
    """Factors of ``queries [M]`` and the KEYS keys from ``first_key`` on: ``[M, KEYS]``.

    ``first_key`` and KEYS are multiples of 4.
    """
    quad = (first_key // 4 + tl.arange(0, KEYS // 4)).to(tl.uint32)[None, :]
    low, high = tl.broadcast(quad, queries.to(tl.uint32)[:, None])
    return _quad_factors(low, high, head, rng_offset, dropout)
