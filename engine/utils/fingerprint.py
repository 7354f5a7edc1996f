"""Tell files apart by their content: small ones by all of it, large ones by samples."""

import hashlib
import os
from pathlib import Path

WHOLE = 64 << 20
"""Bytes up to which a file, or several that are read together, are read whole."""

_SAMPLES, _FEWEST, _SAMPLE = 64, 4, 64 << 10


def is_large(size: int, together: int = 1) -> bool:
    """Return whether a file of so many bytes, one of ``together``, is known by samples."""
    return size > WHOLE // together


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_digest(path: Path, together: int = 1) -> str:
    """Return a hash of a file's size and of 4 MiB of it, evenly spaced; of all of a small one.

    Args:
        path: of the file.
        together: how many files are read together, which share the 4 MiB: of each 256 KiB or more.
    """
    size = path.stat().st_size
    if not is_large(size, together):
        return digest(path)
    found, samples = hashlib.sha256(str(size).encode()), max(_FEWEST, _SAMPLES // together)
    last = max(0, size - _SAMPLE)
    with path.open("rb", buffering=0) as file:
        for number in range(samples):
            start = last * number // (samples - 1)
            found.update(os.pread(file.fileno(), _SAMPLE, start))
    return f"samples:{found.hexdigest()}"
