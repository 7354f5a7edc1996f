"""Pad the batches of a run to a few shapes.

Compiled code and recorded graphs serve every batch of one shape.  Batches of short sentences differ
in every token count, so each task's tokens are padded to one of a few counts.  The counts with the
least padding are computed beforehand, since the seed determines all batches of a run.  If single
products are compiled instead of whole steps, multiples of a number are few enough.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

_MULTIPLE = 32
"""Counts are rounded up to it before they are merged; tensor cores like such sizes too."""
_MOST_SHAPES = 256
"""That merging starts from: it compares all pairs."""

Counts = npt.NDArray[np.int64]


class BatchShape(NamedTuple):
    """The sizes of the batches of one shape.

    Attributes:
        tokens: of each task, with padding.
        max_seqlen: tokens of the tasks' longest sequence, or more; 0 where batches differ in it.
        max_padding: tokens of the longest padding sequence, or more.
    """

    tokens: tuple[int, ...]
    max_seqlen: int
    max_padding: int


class Shapes(Protocol):
    """Interface that assigns a shape to each batch."""

    def shape(self, tasks: tuple[str, ...], counts: Sequence[int], /) -> BatchShape:
        """Return the shape that a batch with these tokens of each task is padded to."""


class RoundedShapes:
    """Shapes in which every task has a multiple of so many tokens.

    Args:
        multiple: of what.
    """

    def __init__(self, multiple: int) -> None:
        self._multiple = multiple

    def shape(self, _tasks: tuple[str, ...], counts: Sequence[int], /) -> BatchShape:
        """Return the next larger multiples; 0 for a task without tokens."""
        tokens = tuple(-(-count // self._multiple) * self._multiple for count in counts)
        return BatchShape(tokens, max_seqlen=0, max_padding=self._multiple - 1)


class OneShape:
    """The same shape for every batch.

    Args:
        shape: that all of them fit into.
    """

    def __init__(self, shape: BatchShape) -> None:
        self._shape = shape

    def shape(self, _tasks: tuple[str, ...], _counts: Sequence[int], /) -> BatchShape:
        """Return it."""
        return self._shape


class ShapePlan:
    """The shapes of a run's batches.

    Args:
        counts: for each set of tasks that steps train together, int64 ``[steps, K]`` tokens of
            each task in each of these steps.
        limit: the most shapes of all sets together; each set has at least one.
        max_seqlen: tokens of the longest sequence of the run.
    """

    def __init__(
        self, counts: Mapping[tuple[str, ...], Counts], limit: int, max_seqlen: int
    ) -> None:
        own = max(1, limit // max(1, len(counts)))
        self._shapes = {
            tasks: [_shape(row, max_seqlen) for row in merge(of_steps, own)]
            for tasks, of_steps in counts.items()
        }
        self._max_seqlen = max_seqlen

    def __len__(self) -> int:
        """Return how many shapes there are."""
        return sum(map(len, self._shapes.values()))

    def shape(self, tasks: tuple[str, ...], counts: Sequence[int], /) -> BatchShape:
        """Return the smallest planned shape that a batch fits into.

        Where it fits into none, which a plan from some of the steps lets happen, it gets a
        shape of its own.
        """
        fitting = [
            shape
            for shape in self._shapes.get(tasks, [])
            if all(count < room for count, room in zip(counts, shape.tokens, strict=True))
        ]
        if fitting:
            return min(fitting, key=lambda shape: sum(shape.tokens))
        return _shape(_rounded(np.array(counts)), self._max_seqlen)


def merge(counts: Counts, limit: int) -> Counts:
    """Choose at most ``limit`` rows, such that every row of ``counts`` is below one of them.

    Rows are rounded up, and the two whose merging (the larger count of each task) adds the least
    tokens over all steps become one, until few enough are left.

    Args:
        counts: int64 ``[steps, K]``, at least one step.
        limit: at least 1.

    Returns:
        int64 ``[limit or fewer, K]``.
    """
    multiple = _MULTIPLE
    rows, steps = np.unique(_rounded(counts, multiple), axis=0, return_counts=True)
    while len(rows) > max(limit, _MOST_SHAPES):
        multiple *= 2
        rows, steps = np.unique(_rounded(counts, multiple), axis=0, return_counts=True)
    while len(rows) > limit:
        joined = np.maximum(rows[:, None], rows[None])  # [n, n, K]
        total = joined.sum(axis=2)
        added = steps[:, None] * (total - rows.sum(axis=1)[:, None])
        cost = added + added.T
        np.fill_diagonal(cost, np.iinfo(np.int64).max)
        first, second = np.unravel_index(cost.argmin(), cost.shape)
        rows[first] = joined[first, second]
        steps[first] += steps[second]
        rows, steps = np.delete(rows, second, axis=0), np.delete(steps, second)
    return rows


def _rounded(counts: Counts, multiple: int = _MULTIPLE) -> Counts:
    """Round up to multiples, leaving at least one token of padding."""
    return (counts // multiple + 1) * multiple


def _shape(tokens: Counts, max_seqlen: int) -> BatchShape:
    return BatchShape(tuple(tokens.tolist()), max_seqlen, max_padding=int(tokens.max()))
