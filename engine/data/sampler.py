"""Choose the examples of each batch, as a function of the seed and the step's number.

Nothing here has a state.  An epoch's order is a function of (seed, task, epoch), a batch one of
(seed, task, step): a resumed run needs its step's number alone, and no other random draw of the run
can change the order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from ..utils.arrays import Indices
from ..utils.rng import Numbers, compact_permutation, permutation

T = TypeVar("T")


class Sampler(Protocol):
    """The batches of one task or objective.

    Attributes:
        task: its name.
        by_rank: whether the ranks have examples of their own: of R ranks, those at the places
            r, r + R, … of a batch are of rank r.
    """

    task: str
    by_rank: ClassVar[bool]

    @property
    def batch_size(self) -> int:
        """Examples in a batch, at least."""

    @property
    def batches(self) -> int:
        """How many batches go once through all examples."""

    def __len__(self) -> int:
        """Return how many examples there are to draw from."""

    def batch(self, step: int) -> Indices:
        """Return the examples of batch ``step`` (from 0), int64."""


class TaskSampler:
    """The batches of one task.

    The task goes through its examples in a fresh order every time it has used them up, in the
    middle of a batch if need be, so that every batch is full.
    """

    by_rank: ClassVar[bool] = False

    def __init__(
        self,
        task: str,
        num_examples: int,
        batch_size: int,
        seed: int,
        subset: Indices | None = None,
    ) -> None:
        """Describe the batches.

        Args:
            task: the task's name; tasks of one run draw different orders.
            num_examples: how many examples the split has.
            batch_size: examples in a batch.
            seed: the run's seed.
            subset: the examples to draw from, such as :func:`stratified_subset` gives them; None
                for all.

        Raises:
            ValueError: there is nothing to draw from, or the batch is empty.
        """
        self._size = num_examples if subset is None else len(subset)
        if self._size < 1:
            raise ValueError(f"num_examples: task {task!r} has no example to draw")
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.task = task
        self.batch_size = batch_size
        self._subset = subset
        self._orders = _LastTwo(partial(compact_permutation, self._size, seed, task))

    def __len__(self) -> int:
        """Return how many examples there are to draw from."""
        return self._size

    @property
    def batches(self) -> int:
        """How many batches go once through all examples."""
        return -(-len(self) // self.batch_size)

    def batch(self, step: int) -> Indices:
        """Return the examples of batch ``step`` (from 0), int64 ``[batch_size]``."""
        position = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(position, len(self))
        chosen = np.empty(self.batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = self._orders(int(epoch))[places[now]]
        return chosen if self._subset is None else self._subset[chosen]


class TokenSampler:
    """The batches of an objective that have about the same number of tokens, not of examples.

    All examples in a fresh order, once and again, are one stream; batch i has those that begin
    among its tokens ``i * tokens`` to ``(i + 1) * tokens``.

    Attributes:
        task: the objective's name.
        tokens: of a batch, on average.
        batch_size: examples that every batch has at least, if they are as long as the longest.
    """

    by_rank: ClassVar[bool] = False

    def __init__(self, task: str, sizes: Indices, tokens: int, seed: int) -> None:
        """Describe the batches.

        Args:
            task: the objective's name.
            sizes: tokens of each example, int64 ``[n]``.
            tokens: of a batch; at least those of the longest example.
            seed: the run's seed.

        Raises:
            ValueError: there is no example, or one has more tokens than a batch.
        """
        if not len(sizes):
            raise ValueError(f"sizes: {task!r} has no example to draw")
        if tokens < sizes.max():
            raise ValueError(f"tokens: expected at least {sizes.max()}, got {tokens}")
        self.task, self.tokens, self._size = task, tokens, len(sizes)
        self._streams = _LastTwo(partial(_stream, sizes, seed, task))
        self._whole = int(sizes.sum())
        self.batch_size = max(1, tokens // int(sizes.max()))

    def __len__(self) -> int:
        """Return how many examples there are to draw from."""
        return self._size

    @property
    def batches(self) -> int:
        """How many batches go once through all examples."""
        return -(-self._whole // self.tokens)

    def batch(self, step: int) -> Indices:
        """Return the examples of batch ``step`` (from 0), int64."""
        first, last = step * self.tokens, (step + 1) * self.tokens
        found = []
        for epoch in range(first // self._whole, (last - 1) // self._whole + 1):
            order, starts = self._streams(epoch)
            bounds = np.array([first, last]) - epoch * self._whole
            begin, end = np.searchsorted(starts, bounds)
            found.append(order[begin:end])
        return np.concatenate(found).astype(np.int64)


class RankSampler:
    """The batches of a task whose ranks have examples of their own.

    Every rank goes through its examples in an order of its own, as :class:`TaskSampler` does; the
    examples of rank 0 are numbered first, then those of rank 1, and so on.
    """

    by_rank: ClassVar[bool] = True

    def __init__(
        self,
        task: str,
        sizes: Sequence[int],
        batch_size: int,
        seed: int,
    ) -> None:
        """Describe the batches.

        Args:
            task: the task's name.
            sizes: examples that each of R ranks has.
            batch_size: examples in a batch of all ranks.
            seed: the run's seed.

        Raises:
            ValueError: a rank has no example, or no place in a batch.
        """
        ranks = len(sizes)
        if batch_size < ranks:
            raise ValueError(f"batch_size: expected at least {ranks}, got {batch_size}")
        self.task, self.batch_size = task, batch_size
        self._samplers = [
            TaskSampler(f"{task}/rank {rank}", size, len(range(rank, batch_size, ranks)), seed)
            for rank, size in enumerate(sizes)
        ]
        self._starts = (np.cumsum(sizes) - sizes).tolist()

    def __len__(self) -> int:
        """Return how many examples there are to draw from, of all ranks."""
        return sum(map(len, self._samplers))

    @property
    def batches(self) -> int:
        """How many batches have as many examples as there are."""
        return -(-len(self) // self.batch_size)

    def batch(self, step: int) -> Indices:
        """Return the examples of batch ``step`` (from 0), int64 ``[batch_size]``."""
        chosen = np.empty(self.batch_size, dtype=np.int64)
        ranks = len(self._samplers)
        for rank, (sampler, start) in enumerate(zip(self._samplers, self._starts, strict=True)):
            chosen[rank::ranks] = sampler.batch(step) + start
        return chosen


def stratified_subset(labels: npt.NDArray[np.float32], limit: int, task: str, seed: int) -> Indices:
    """Choose examples that keep the distribution of the labels.

    Every label gets its share of ``limit``, rounded by the largest remainder; labels of a
    regression are rounded to the nearest whole number first.

    Args:
        labels: float32 ``[n]``.
        limit: how many to choose.
        task: the task's name.
        seed: decides which are chosen.

    Returns:
        int64 ``[min(limit, n)]``, ascending.
    """
    if limit >= len(labels):
        return np.arange(len(labels))
    _, strata, sizes = np.unique(np.floor(labels + 0.5), return_inverse=True, return_counts=True)
    shares = sizes * limit / len(labels)
    quotas = np.floor(shares).astype(np.int64)
    largest = np.argsort(quotas - shares, kind="stable")[: limit - quotas.sum()]
    quotas[largest] += 1

    order = permutation(len(labels), seed, f"{task}/subset", 0)
    by_stratum = order[np.argsort(strata[order], kind="stable")]
    starts = np.cumsum(sizes) - sizes
    rank = np.arange(len(labels)) - np.repeat(starts, sizes)
    return np.sort(by_stratum[rank < np.repeat(quotas, sizes)])


class _LastTwo(Generic[T]):
    """A function of an epoch, whose last two values are kept: a batch may be of two epochs."""

    def __init__(self, make: Callable[[int], T]) -> None:
        self._make = make
        self._kept: tuple[tuple[int, T], ...] = ()

    def __call__(self, epoch: int) -> T:
        for known, value in self._kept:
            if known == epoch:
                return value
        value = self._make(epoch)
        self._kept = (*self._kept[-1:], (epoch, value))
        return value


def _stream(sizes: Indices, seed: int, task: str, epoch: int) -> tuple[Numbers, Indices]:
    """Return the order of an epoch, and the token that each example begins with there."""
    order = compact_permutation(len(sizes), seed, task, epoch)
    own = sizes[order]
    return order, np.cumsum(own) - own
