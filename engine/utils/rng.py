"""Random numbers for data, as functions of names such as seed, task and step.

The names are hashed (BLAKE2b) into the key of a Philox generator, whose raw output numpy promises
never to change.  Nothing here has a state, so no draw changes another, and a resumed run draws the
same numbers.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

_PARTS, _BLOCK = 16, 1 << 18

Numbers = npt.NDArray[np.unsignedinteger[Any]]


def uniforms(count: int, *names: object) -> npt.NDArray[np.float64]:
    """Return ``count`` numbers in [0, 1), float64: multiples of 2^-53."""
    return (_raw(count, *names) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *names: object) -> npt.NDArray[np.int64]:
    """Return a random order of ``range(count)``, int64.

    It sorts raw output, since numpy does not promise that ``Generator.permutation`` stays the same.
    """
    return compact_permutation(count, *names).astype(np.int64)


def compact_permutation(count: int, *names: object) -> Numbers:
    """Return the same order as uint32, or as uint64 where that is too narrow.

    Of many numbers it takes about 6 bytes each: they are sorted in 16 parts, by the first bits of
    the raw output, which is drawn anew for each part.
    """
    dtype: type[np.uint32 | np.uint64] = np.uint32 if count <= 1 << 32 else np.uint64
    if count <= _BLOCK:
        return np.argsort(_raw(count, *names), kind="stable").astype(dtype)
    order, done = np.empty(count, dtype=dtype), 0
    for part in range(_PARTS):
        numbers, raw = [], []
        generator = _generator(*names)
        for first in range(0, count, _BLOCK):
            drawn = generator.random_raw(min(_BLOCK, count - first))
            own = np.flatnonzero(drawn >> np.uint64(60) == part)
            raw.append(drawn[own])
            numbers.append((own + first).astype(dtype))
        whole = np.concatenate(numbers)
        order[done : done + len(whole)] = whole[np.argsort(np.concatenate(raw), kind="stable")]
        done += len(whole)
    return order


def _raw(count: int, *names: object) -> npt.NDArray[np.uint64]:
    """Return ``count`` random 64-bit numbers."""
    return _generator(*names).random_raw(count)


def _generator(*names: object) -> np.random.Philox:
    """Return the generator that some names give the key of."""
    text = "/".join(map(str, names)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Philox(key=key)
