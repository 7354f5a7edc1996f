"""Numpy arrays that say where ragged rows stand in a flat one."""

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


def ranges(starts: Indices, sizes: Indices) -> Indices:
    """Return ``starts[i], starts[i] + 1, …`` (``sizes[i]`` numbers) for one i after the other."""
    ends = np.cumsum(sizes)
    return np.arange(sizes.sum()) + np.repeat(starts - ends + sizes, sizes)


def offsets_of(sizes: npt.ArrayLike) -> Indices:
    """Return where rows of such sizes begin, and where the last ends, int64 ``[n + 1]``."""
    return np.concatenate(([0], np.cumsum(np.asarray(sizes, dtype=np.int64))))
