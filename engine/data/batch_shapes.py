"""Pad the batches of a run to a few shapes.

Compiled code and recorded graphs serve every batch of one shape.  Batches of short sentences differ
in every token count, so each task's tokens are padded to one of a few counts.  The counts with the
least padding are computed beforehand, since the seed determines all batches of a run.  If single
products are compiled instead of whole steps, multiples of a number are few enough.

Padding is cut into sequences of ``PADDING_TOKENS`` at most, which attention computes together with
short sentences.  How many there are is part of the shape, so that a batch that lacks fewer tokens
has empty ones.  A bound of its longest sequence is part of it, too: a step whose sequences are all
short launches no kernels for long ones.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .._kernels import kernels

_MULTIPLE = 32
"""Counts are rounded up to it before they are merged; tensor cores like such sizes too."""
_MOST_SHAPES = 256
"""That merging starts from: it compares all pairs."""
PADDING_TOKENS = 32
"""The most tokens of a padding sequence.

A divisor of ``_MULTIPLE``: behind the first one of a task all are whole and begin at multiples of
it, so that two of them fill a run of attention.
"""
SHORT: int = kernels.attention.attention_plan.SURELY_SHORT
"""The most tokens of a sentence that needs no kernels for long ones."""

Counts = npt.NDArray[np.int64]


class BatchShape(NamedTuple):
    """The sizes of the batches of one shape.

    Attributes:
        tokens: of each task, with padding.
        max_seqlen: tokens of the tasks' longest sequence, or more; less where batches differ in it.
        max_padding: tokens of the longest padding sequence, or more.
        padding_sequences: of each task that lacks tokens; some may be empty.
    """

    tokens: tuple[int, ...]
    max_seqlen: int
    max_padding: int
    padding_sequences: tuple[int, ...]


class Shapes(Protocol):
    """Interface that assigns a shape to each batch."""

    def shape(self, tasks: tuple[str, ...], counts: Sequence[int], longest: int, /) -> BatchShape:
        """Return the shape that a batch is padded to.

        Args:
            tasks: of the batch.
            counts: the tokens of each.
            longest: the tokens of its longest sequence.
        """


class RoundedShapes:
    """Shapes in which every task has a multiple of so many tokens.

    Args:
        multiple: of what.
    """

    def __init__(self, multiple: int) -> None:
        self._multiple = multiple

    def shape(self, _tasks: tuple[str, ...], counts: Sequence[int], _longest: int, /) -> BatchShape:
        """Return the next larger multiples; 0 for a task without tokens."""
        tokens = tuple(-(-count // self._multiple) * self._multiple for count in counts)
        most = self._multiple - 1
        return BatchShape(
            tokens,
            max_seqlen=0,
            max_padding=min(most, PADDING_TOKENS),
            padding_sequences=(-(-most // PADDING_TOKENS),) * len(tokens),
        )


class OneShape:
    """The same shape for every batch.

    Args:
        shape: that all of them fit into.
    """

    def __init__(self, shape: BatchShape) -> None:
        self._shape = shape

    def shape(
        self, _tasks: tuple[str, ...], _counts: Sequence[int], _longest: int, /
    ) -> BatchShape:
        """Return it."""
        return self._shape


class ShapePlan:
    """The shapes of a run's batches.

    Args:
        counts: for each set of tasks that steps train together, int64 ``[steps, K]`` tokens of
            each task in each of these steps.
        limit: the most shapes of all sets together; each set has at least one.  Where some batches
            have long sequences and others not, and there are enough, every token count has two.
        longest: tokens of the longest sequence of each batch, of at least one.
    """

    def __init__(
        self, counts: Mapping[tuple[str, ...], Counts], limit: int, longest: Sequence[int]
    ) -> None:
        self._max_seqlen = self._short = max(longest)
        if min(longest) <= SHORT < max(longest) and limit >= 2 * len(counts):
            self._short, limit = SHORT, limit // 2
        own = max(1, limit // max(1, len(counts)))
        self._tokens = {
            tasks: [tuple(row) for row in merge(of_steps, own).tolist()]
            for tasks, of_steps in counts.items()
        }

    def __len__(self) -> int:
        """Return how many shapes there are."""
        kinds = 1 if self._short == self._max_seqlen else 2
        return kinds * sum(map(len, self._tokens.values()))

    def shape(self, tasks: tuple[str, ...], counts: Sequence[int], longest: int, /) -> BatchShape:
        """Return the smallest planned shape that a batch fits into.

        Where it fits into none, which a plan from some of the steps lets happen, it gets a
        shape of its own.
        """
        fitting = [
            tokens
            for tokens in self._tokens.get(tasks, [])
            if all(count < size for count, size in zip(counts, tokens, strict=True))
        ]
        own = tuple(_rounded(np.array(counts)).tolist())
        tokens = min(fitting, key=sum, default=own)
        return BatchShape(
            tokens,
            max_seqlen=self._short if longest <= self._short else self._max_seqlen,
            max_padding=PADDING_TOKENS,
            padding_sequences=tuple(count // PADDING_TOKENS for count in tokens),
        )


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
