"""Random numbers for data, as functions of names such as seed, task and step.

The names are hashed (BLAKE2b) into the key of a Philox generator, whose raw output numpy promises
never to change.  Nothing here has a state, so no draw changes another, and a resumed run draws the
same numbers.
"""

import hashlib

import numpy as np
import numpy.typing as npt


def uniforms(count: int, *names: object) -> npt.NDArray[np.float64]:
    """Return ``count`` numbers in [0, 1), float64: multiples of 2^-53."""
    return (_raw(count, *names) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *names: object) -> npt.NDArray[np.int64]:
    """Return a random order of ``range(count)``, int64.

    It sorts raw output, since numpy does not promise that ``Generator.permutation`` stays the same.
    """
    return np.argsort(_raw(count, *names), kind="stable")


def _raw(count: int, *names: object) -> npt.NDArray[np.uint64]:
    """Return ``count`` random 64-bit numbers."""
    text = "/".join(map(str, names)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Philox(key=key).random_raw(count)
