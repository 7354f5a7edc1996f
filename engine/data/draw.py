"""Random numbers for one example of one step, whatever else is in the batch."""

import hashlib

import numpy as np
import numpy.typing as npt


def uniforms(count: int, *names: object) -> npt.NDArray[np.float64]:
    """Return numbers in [0, 1), float64 ``[count]``, that follow from the names alone.

    They are raw Philox output, which numpy promises never to change.
    """
    text = "/".join(map(str, names)).encode()
    key = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    raw = np.random.Philox(key=key).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
