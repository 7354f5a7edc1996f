"""Elementwise dropout on the GPU; `kernels.dropout.dropout` has the maths."""

# Kernels are Triton's language, not typed Python, and write compile-time constants in capitals.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox_triton import DropoutArguments, element_factors

_BLOCK = 4096


@triton.jit(do_not_specialize=["count", "rng_offset"])
def _dropout_kernel(x, out, count, dropout, rng_offset, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK + tl.zeros([1], tl.int64)
    elements = first[:, None] + tl.arange(0, BLOCK)[None, :]
    values = tl.load(x + elements, mask=elements < count, other=0.0).to(tl.float32)
    values *= element_factors(first, rng_offset, dropout, BLOCK)
    tl.store(out + elements, values.to(out.dtype.element_ty), mask=elements < count)


def dropout(x: Tensor, p: float, seed: Tensor, rng_offset: int) -> Tensor:
    """Elementwise dropout of a tensor of any shape."""
    x = x.contiguous()
    out = torch.empty_like(x)
    count = x.numel()
    if count > 0:
        _dropout_kernel[(triton.cdiv(count, _BLOCK),)](
            x, out, count, DropoutArguments.of(p, seed), rng_offset, _BLOCK
        )
    return out
