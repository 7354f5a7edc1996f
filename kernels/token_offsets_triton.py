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
import triton.language as tl  # noqa: F401 (the interpreter wants it beside every function)


def encode_offsets(offsets: Sequence[int], length: int) -> tuple[int, ...]:
    """The argument of a kernel that takes ``length`` offsets, the last one over and over."""
    last = offsets[-1]
    return tuple(2 * offset + 3 for offset in [*offsets, *[last] * (length - len(offsets))])


@triton.jit
def decode_offset(encoded):
    """An offset of the tuple, decoded."""
    return (encoded >> 1) - 1


@triton.jit
def decode_opaque_offset(encoded):
    """The same, of which LLVM does not see that it has 31 bits.

    Where it does, it knows that sums with the offset do not overflow, and counts in 64 bits in a
    loop that begins there.  Layer norm's kernels then take fewer registers, but linear layers'
    spill them.
    """
    return encoded - (encoded >> 1) - 2
