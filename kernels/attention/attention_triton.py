"""Launches the Triton kernels of attention: tile sizes, grids and what is allocated."""

# Triton's decorated functions are untyped.
# mypy: allow-untyped-calls, ignore-missing-imports

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attention_options import AttentionOptions
from .attention_triton_kernels import (
    Heads,
    Intervals,
    KernelOptions,
    delta_kernel,
    forward_kernel,
    grad_kv_kernel,
    grad_q_kernel,
    intervals_kernel,
)


class Tiles(NamedTuple):
    """Tile sizes and launch settings of one kernel."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# By kernel, bytes of an element and padded width.  No kernel spills registers or takes more shared
# memory than an sm_80 has.  Those of 2 bytes and width 64 are about the fastest of a dozen on an
# H200 (bench/results/h200); the others are not timed yet.
TILES: dict[tuple[str, int, int], Tiles] = {
    ("forward", 2, 32): Tiles(64, 64, 4, 2),
    ("forward", 2, 64): Tiles(64, 32, 4, 2),
    ("forward", 2, 128): Tiles(64, 32, 8, 2),
    ("forward", 4, 32): Tiles(64, 32, 4, 2),
    ("forward", 4, 64): Tiles(64, 32, 8, 2),
    ("forward", 4, 128): Tiles(32, 16, 8, 2),
    ("grad_q", 2, 32): Tiles(64, 64, 4, 2),
    ("grad_q", 2, 64): Tiles(64, 32, 4, 3),
    ("grad_q", 2, 128): Tiles(64, 32, 8, 2),
    ("grad_q", 4, 32): Tiles(64, 32, 4, 2),
    ("grad_q", 4, 64): Tiles(64, 32, 8, 2),
    ("grad_q", 4, 128): Tiles(32, 16, 4, 2),
    ("grad_kv", 2, 32): Tiles(64, 64, 8, 2),
    ("grad_kv", 2, 64): Tiles(32, 32, 2, 2),
    ("grad_kv", 2, 128): Tiles(64, 32, 8, 2),
    ("grad_kv", 4, 32): Tiles(32, 64, 4, 2),
    ("grad_kv", 4, 64): Tiles(32, 32, 4, 2),
    ("grad_kv", 4, 128): Tiles(32, 32, 8, 1),
}
# The same, where sequences are longer than LONG tokens on average and others are faster.
LONG_TILES: dict[tuple[str, int, int], Tiles] = {
    ("forward", 2, 64): Tiles(64, 64, 4, 3),
}
LONG = 512
MAX_WIDTH = 128
INTERVAL_ROWS = 128
DELTA_ROWS = 64


def padded_width(width: int) -> int:
    """Columns of a tile for heads of ``width``, a power of two."""
    padded: int = max(32, triton.next_power_of_2(width))
    return padded


def _constants(kernel: str, x: Tensor, cu_seqlens: Tensor) -> dict[str, Any]:
    """The constexpr arguments and launch settings of one of the three large kernels."""
    width = x.shape[2]
    if width > MAX_WIDTH:
        raise ValueError(f"q: heads of at most {MAX_WIDTH} columns on a GPU, got {width}")
    block_d = padded_width(width)
    key = (kernel, x.element_size(), block_d)
    long = len(x) > LONG * (len(cu_seqlens) - 1)
    tiles = LONG_TILES.get(key, TILES[key]) if long else TILES[key]
    return {
        # float32 is computed as float32, not as TF32.
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
        "D": width,
        "BLOCK_D": block_d,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _intervals(
    cu_own: Tensor,
    cu_other: Tensor,
    total: int,
    total_other: int,
    options: AttentionOptions,
    *,
    rows_are_keys: bool,
) -> Intervals:
    first, last = torch.empty(2, total, dtype=torch.int32, device=cu_own.device)
    num_sequences = len(cu_own) - 1
    intervals_kernel[(triton.cdiv(total, INTERVAL_ROWS),)](
        cu_own,
        cu_other,
        Intervals(first, last),
        total,
        total_other,
        num_sequences,
        num_sequences.bit_length(),
        rows_are_keys,
        options.causal,
        INTERVAL_ROWS,
    )
    return Intervals(first, last)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
) -> tuple[Tensor, Tensor]:
    """Output ``[Tq, H, D]`` and log-sum-exp ``[H, Tq]``."""
    total_q, heads, _ = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((heads, total_q), dtype=torch.float32)
    if total_q == 0:
        return out, lse
    constants = _constants("forward", q, cu_seqlens_q)
    boundaries = (cu_seqlens_q, cu_seqlens_k, total_q, len(k))
    forward_kernel[(triton.cdiv(total_q, constants["BLOCK_M"]), heads)](
        Heads.of(q),
        Heads.of(k),
        Heads.of(v),
        Heads.of(out),
        lse,
        _intervals(*boundaries, options, rows_are_keys=False),
        total_q,
        KernelOptions.of(options),
        options.rng_offset,
        **constants,
    )
    return out, lse


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: AttentionOptions,
    *,
    grads: tuple[Tensor, ...],
) -> None:
    """Write the gradients of q, k and v, which may be views of one tensor, into ``grads``."""
    total_q, heads, width = q.shape
    total_k = len(k)
    grad_q, grad_k, grad_v = grads
    grad_out = grad_out.contiguous()
    # Of equal boundaries, those of self-attention, every query sees a key.  Of others one may
    # see none; its values and gradients must not count, but a NaN among them would, times 0.
    if cu_seqlens_q.data_ptr() != cu_seqlens_k.data_ptr():
        blind = lse.isneginf().T[..., None]
        q, grad_out = q.masked_fill(blind, 0), grad_out.masked_fill(blind, 0)
    delta = torch.empty_like(lse)
    norm = torch.empty_like(lse) if q.dtype == torch.float32 else None
    shared = (Heads.of(q), Heads.of(k), Heads.of(v), Heads.of(grad_out), lse, delta, norm)
    numbers = (KernelOptions.of(options), options.rng_offset)
    if total_q > 0:
        constants = _constants("grad_q", q, cu_seqlens_q)
        if q.dtype != torch.float32:
            delta_kernel[(triton.cdiv(total_q, DELTA_ROWS), heads)](
                Heads.of(out),
                Heads.of(grad_out),
                delta,
                total_q,
                width,
                constants["BLOCK_D"],
                DELTA_ROWS,
            )
        boundaries = (cu_seqlens_q, cu_seqlens_k, total_q, total_k)
        keys = _intervals(*boundaries, options, rows_are_keys=False)
        grid = (triton.cdiv(total_q, constants["BLOCK_M"]), heads)
        grad_q_kernel[grid](*shared, Heads.of(grad_q), keys, total_q, *numbers, **constants)
    if total_k > 0:
        constants = _constants("grad_kv", k, cu_seqlens_k)
        boundaries = (cu_seqlens_k, cu_seqlens_q, total_k, total_q)
        queries = _intervals(*boundaries, options, rows_are_keys=True)
        grid = (triton.cdiv(total_k, constants["BLOCK_N"]), heads)
        grad_kv = (Heads.of(grad_k), Heads.of(grad_v))
        grad_kv_kernel[grid](*shared, *grad_kv, queries, total_q, total_k, *numbers, **constants)
