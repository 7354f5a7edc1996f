"""Token offsets as arguments of Triton kernels.

The offsets are integers that the host knows, so a kernel takes them as a tuple, and nothing is
copied to the device.  Triton compiles a kernel anew where an integer of a tuple is 1 or a multiple
of 16, and a tuple's integers cannot be left out of that as others can.  An offset ``b`` therefore
goes as ``2 b + 3``, which is odd and never 1.
"""

# Kernels are Triton's language, not typed Python.
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, ignore-missing-imports

from collections.abc import Sequence

import triton
import triton.language as tl


def encode_offsets(offsets: Sequence[int], length: int) -> tuple[int, ...]:
    """The argument of a kernel that takes ``length`` offsets, the last one over and over."""
    last = offsets[-1]
    return tuple(2 * offset + 3 for offset in [*offsets, *[last] * (length - len(offsets))])


@triton.jit
def decode_offset(encoded, number: tl.constexpr):
    """The offset of this number."""
    # Not (… >> 1) - 1: LLVM would see that it has 31 bits, conclude that a sum with it cannot
    # overflow, and count in 64 bits in loops that begin there: linear layers' kernels would spill.
    return encoded[number] - (encoded[number] >> 1) - 2
