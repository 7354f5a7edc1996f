"""What all kernels check: dtypes, and values that lie on the device, as boundaries and indices do.

On the CPU every call checks values.  On a GPU looking at one means waiting for it, so there it is
for debugging: call :func:`check_cu_seqlens` where a batch is made, or run a step that misbehaves
within :func:`checked_values`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What every kernel takes; float64 is computed by its reference."""

_enabled = False


@contextmanager
def checked_values() -> Iterator[None]:
    """Within it, every call on CUDA tensors looks at the values of its boundaries and indices.

    Each look waits for the device.  Code that `torch.compile` has compiled is not checked, nor can
    a CUDA graph be captured.
    """
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def may_look(x: Tensor) -> bool:
    """Whether a call on ``x`` may look at values in Python."""
    if torch.compiler.is_compiling():
        return False
    return _enabled if x.is_cuda else x.device.type == "cpu"


def are_checked(x: Tensor) -> bool:
    """Whether a call of a kernel on ``x`` is to look at values in Python.

    The C++ kernels look themselves; the float64 references on a CPU do not.
    """
    return may_look(x) and (x.is_cuda or x.dtype == torch.float64)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    """Check that boundaries start at 0, ascend and end within the stream.

    Args:
        name: what to call them in the message.
        cu_seqlens: ``[S + 1]``, any integer dtype, on any device, which is waited for.
        total: rows of the stream.

    Raises:
        ValueError: they do not.
    """
    values = cu_seqlens.tolist()
    if values[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {values[0]}")
    for position, (start, end) in enumerate(pairwise(values)):
        if start > end:
            raise ValueError(
                f"{name}: expected ascending offsets, got {start} before {end} "
                f"at position {position}"
            )
    if values[-1] > total:
        raise ValueError(f"{name}: expected to end within the {total} rows, got {values[-1]}")


def check_index(name: str, index: Tensor, num_rows: int) -> None:
    """Check that all indices are rows of a table.

    Args:
        name: what to call them in the message.
        index: integers of any shape on any device, which is waited for.
        num_rows: rows of the table.

    Raises:
        ValueError: they are not.
    """
    if index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= num_rows:
        raise ValueError(f"{name}: expected 0 <= index < {num_rows}, got {low} to {high}")
