"""Sequences of tokens one after the other, each read when it is asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from ..utils.arrays import Indices, offsets_of


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequences(Sequence[Indices]):
    """N sequences of token ids.

    Attributes:
        tokens: uint16 or int32 ``[T]``; memory-mapped where they come from the cache.
        offsets: int64 ``[N + 1]``; sequence i is ``tokens[offsets[i]:offsets[i + 1]]``.
    """

    tokens: npt.NDArray[np.integer]
    offsets: Indices

    @classmethod
    def of(cls, sequences: Iterable[Indices], vocab_size: int) -> "PackedSequences":
        """Put sequences together.

        Args:
            sequences: of token ids.
            vocab_size: one more than the largest of these.
        """
        listed = list(sequences)
        dtype = token_dtype(vocab_size)
        tokens = np.concatenate([np.empty(0, dtype), *(each.astype(dtype) for each in listed)])
        return cls(tokens, offsets_of([len(each) for each in listed]))

    def __len__(self) -> int:
        """Return N."""
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Indices: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Indices]: ...
    def __getitem__(self, index: int | slice) -> Indices | Sequence[Indices]:
        """Return a sequence, int64, or several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, stop = self.offsets[index % len(self) :][:2]
        return self.tokens[start:stop].astype(np.int64)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Return the smallest dtype that token ids are kept in."""
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
