"""Compare what all ranks must have the same: weights, random state, state of the update.

Ranks send each other gradients, and each rank takes the others' weights, seed and step for its own.
A memory error on one machine, or machines that compute other bits, would train on without a word.
So every few steps each rank makes a checksum of its weights and of that state, on its device and
without waiting for it; the ranks compare them when the host reads metrics anyway.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .._kernels import kernels
from .ranks import Ranks


class Mismatch(NamedTuple):
    """What ranks do not have the same.

    Attributes:
        steps_done: steps of the run after which it was so first.
        between: the ranks, as a phrase: ``rank 1 differs from ranks 0, 2-3``.
        names: of what differs.
    """

    steps_done: int
    between: str
    names: tuple[str, ...]


class RankCheck:
    """Checksums of the state that ranks share, taken every few steps and compared later.

    Args:
        ranks: the processes of the run; of a single one nothing is done.
        every: steps between two checksums; 0: none at all.
        state: the tensors that all ranks have the same, by what messages call them; they stay in
            place.
    """

    def __init__(self, ranks: Ranks, every: int, state: Mapping[str, Sequence[Tensor]]) -> None:
        self._ranks, self._state = ranks, state
        self._every = every if ranks.size > 1 else 0
        self._waiting: dict[int, Tensor] = {}
        self._latest = -1

    def add(self, steps_done: int, *, now: bool = False) -> None:
        """Take the checksums after a step if they are due; nothing waits for the device.

        Args:
            steps_done: steps of the run so far.
            now: take them whatever the number, but once after a step.
        """
        if not self._every or steps_done == self._latest:
            return
        if now or steps_done % self._every == 0:
            sums = [kernels.weights_checksum(tensors) for tensors in self._state.values()]
            self._waiting[steps_done] = torch.stack(sums)
            self._latest = steps_done

    def mismatch(self) -> Mismatch | None:
        """Compare what was taken since the last call, which waits for it; all ranks must call.

        Returns:
            The first mismatch, the same on all ranks; None if there is none.
        """
        if not self._waiting:
            return None
        own = torch.cat(list(self._waiting.values())).tolist()
        steps = list(self._waiting)
        self._waiting.clear()
        if self._ranks.have_equal(own):
            return None
        count = len(self._state)
        of_ranks = [
            [tuple(row[start : start + count]) for start in range(0, len(row), count)]
            for row in self._ranks.gather(own)
        ]
        for steps_done, *sums in zip(steps, *of_ranks, strict=True):
            if len(set(sums)) > 1:
                of_names = zip(self._state, *sums, strict=True)
                names = tuple(name for name, *each in of_names if len(set(each)) > 1)
                return Mismatch(steps_done, _between(sums), names)
        return None


def _between(sums: Sequence[tuple[int, ...]]) -> str:
    """Name the ranks that differ, those of a majority last."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for rank, own in enumerate(sums):
        alike.setdefault(own, []).append(rank)
    groups = sorted(alike.values(), key=len)
    if 2 * len(groups[-1]) <= len(sums):
        return " and ".join(map(_spelt, sorted(groups))) + " differ"
    odd = sorted(rank for group in groups[:-1] for rank in group)
    return f"{_spelt(odd)} differ{'s' * (len(odd) == 1)} from {_spelt(groups[-1])}"


def _spelt(ranks: Sequence[int]) -> str:
    """Return ``rank 1``, or ``ranks 0, 2-3``; of many pieces the first eight."""
    starts = [0, *(i for i, (one, next_) in enumerate(pairwise(ranks), 1) if next_ > one + 1)]
    ends = [*starts[1:], len(ranks)]
    pieces = [
        f"{ranks[start]}" + (f"-{ranks[end - 1]}" if end - start > 1 else "")
        for start, end in zip(starts, ends, strict=True)
    ]
    more = ", …" if len(pieces) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(pieces[:8])}{more}"
