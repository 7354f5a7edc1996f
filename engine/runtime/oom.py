"""Recognise errors of memory, refuse what cannot fit, and say what to do."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..utils.errors import OutOfMemoryError
from ..utils.memory import machine_memory

SMALLER_MODEL = "take a smaller encoder, or train fewer tasks"
"""Advice where weights, gradient rows and moments do not fit in memory."""

_GIB = 1 << 30

_SHORTAGES = (
    "can't allocate memory",
    "Storage size calculation overflowed",
    "could not create a primitive",
    "can't start new thread",
)
"""Messages of the CPU's allocator, oneDNN and threads, which have no exception of their own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORTAGES)


@contextmanager
def memory_explained(what_to_do: str) -> Iterator[None]:
    """Turn an out-of-memory error into one line with what to do.

    Raises:
        OutOfMemoryError: in place of what torch and Python raise.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {what_to_do}") from error


def check_memory(wanted: int, what_to_do: str) -> None:
    """Refuse tensors larger than the machine's memory, whose allocation would not fail.

    Systems promise more memory than there is, and end the process that uses it.

    Args:
        wanted: bytes.
        what_to_do: where they do not fit.

    Raises:
        OutOfMemoryError: they do not.
    """
    found = machine_memory()
    if wanted > found:
        raise OutOfMemoryError(
            f"out of memory: {wanted / _GIB:,.1f} GiB are needed, the machine has "
            f"{found / _GIB:,.1f}; {what_to_do}"
        )
