"""A training set whose examples are divided among ranks: each has its own, and sizes of all."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..utils.arrays import Indices
from .masked_text import MaskedText
from .raw_text import Found
from .sentences_twice import SentencesTwice
from .split import TokenizedSplit
from .task_batch import TaskBatch, TextIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What is printed of the files of all ranks.

    Attributes:
        files: how many there are.
        rows: their examples, before the recipe cuts them.
        truncated: how many sentences were cut to the limit on the length.
        bad_rows: how many rows were skipped or blanked, by reason.
        first_bad: what was wrong with the first of these.
        notes: what was found out about files, a line each.
        found: of an objective, the texts that were found; None of a task.
    """

    files: int
    rows: int
    truncated: int
    bad_rows: dict[str, int]
    first_bad: str
    notes: tuple[str, ...]
    found: Found | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RankExamples:
    """The N examples of R ranks, seen from one of them.

    Those of rank 0 are numbered first, then those of rank 1, and so on.

    Attributes:
        own: what this rank has read: a split, or the text of an objective.
        rank: this rank.
        sizes: how many examples each rank trains on; their sum is N.
        chosen: int64 ``[sizes[rank]]``, the examples of ``own`` that are trained on; None for all.
        lengths: uint16 or int32 ``[N, c]``, the tokens of each sequence; None where shapes of
            batches are not planned.
        word_counts: int32 ``[N]``, terms of the loss, where words are tagged; None for one each.
        class_counts: how often each class is a label, over all ranks, as of
            :meth:`.TokenizedSplit.label_counts`; None where classes are not weighed.
        texts: of retrieval, the split with the tokens that texts are known by; None elsewhere.
        report: what is printed of the files.
    """

    own: TokenizedSplit | MaskedText | SentencesTwice
    rank: int
    sizes: tuple[int, ...]
    chosen: Indices | None
    lengths: npt.NDArray[Any] | None
    word_counts: npt.NDArray[np.int32] | None
    class_counts: Indices | None
    texts: TokenizedSplit | None
    report: Report

    @property
    def task(self) -> str:
        """The task's name."""
        return self.own.task

    def __len__(self) -> int:
        """Return N."""
        return sum(self.sizes)

    def _own(self, chosen: Indices) -> Indices:
        """Return which examples of ``own`` are chosen."""
        places = chosen - sum(self.sizes[: self.rank])
        assert ((places >= 0) & (places < self.sizes[self.rank])).all(), "examples of other ranks"
        return places if self.chosen is None else self.chosen[places]

    def task_batch(self, chosen: Indices, step: int, /) -> TaskBatch:
        """Return chosen examples of this rank; nothing about them is random."""
        own = self._own(chosen)
        batch = self.own.task_batch(own, step)
        if self.texts is None:
            return batch
        # States of a frozen encoder have no tokens with them.
        texts = batch if self.texts is self.own else self.texts.task_batch(own, step)
        return replace(batch, labels=TextIds(torch.from_numpy(_ids_of(texts))))

    def sequence_sizes(self, chosen: Indices, step: int, /) -> Indices:
        """Return the tokens of all first sequences of chosen examples, then of all second ones.

        Of other ranks' examples it needs ``lengths``.
        """
        if self.lengths is None:
            return self.own.sequence_sizes(self._own(chosen), step)
        return self.lengths[chosen].T.reshape(-1).astype(np.int64)

    def terms(self, chosen: Indices, /) -> int:
        """Return how many terms the mean loss of chosen examples of any ranks has."""
        return len(chosen) if self.word_counts is None else int(self.word_counts[chosen].sum())

    def precomputed(self, own: TokenizedSplit) -> "RankExamples":
        """Return the same examples with hidden states of a frozen encoder.

        Args:
            own: this rank's, where all tokens are left, or one for each sequence.
        """
        lengths, before = self.lengths, self.own
        assert isinstance(before, TokenizedSplit), "objectives train the encoder"
        if lengths is not None and len(own.tokens) < len(before.tokens):
            lengths = np.broadcast_to(np.ones((), lengths.dtype), lengths.shape)
        return replace(self, own=own, lengths=lengths)


def word_counts(split: TokenizedSplit) -> npt.NDArray[np.int32]:
    """Return how many terms the loss of each example of tagged words has, int32 ``[n]``."""
    assert split.word_offsets is not None
    assert split.word_sizes is not None
    terms = split.word_sizes if split.all_pieces else np.minimum(split.word_sizes, 1)
    ends = np.concatenate(([0], np.cumsum(terms, dtype=np.int64)))[split.word_offsets]
    return np.diff(ends).astype(np.int32)


def _ids_of(batch: TaskBatch) -> Indices:
    """Return a number for each text, int64 ``[n, c]``, that it has on every rank.

    Two texts of a step get the same of 2^63 numbers by chance about never.
    """
    ends = np.cumsum(batch.sizes)
    ids = [
        int.from_bytes(hashlib.blake2b(text.tobytes(), digest_size=8).digest(), "little") >> 1
        for text in np.split(batch.tokens, ends[:-1])
    ]
    by_column = np.array(ids[: len(batch.sizes)], dtype=np.int64).reshape(batch.columns, -1)
    return np.ascontiguousarray(by_column.T)
