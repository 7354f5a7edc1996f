"""Examples of SimCSE: every sentence twice in one batch (engine/models/heads/contrastive.py)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..utils.arrays import Indices
from .raw_text import NOT_KNOWN, Found
from .task_batch import TaskBatch


@dataclass(frozen=True, slots=True)
class SentencesTwice:
    """The examples of SimCSE: n sentences, each of which a batch has twice.

    Attributes:
        task: the objective's name.
        sentences: their tokens, [CLS] and [SEP] included.
        found: where they come from.
    """

    task: str
    sentences: Sequence[Indices]
    found: Found = NOT_KNOWN

    def __len__(self) -> int:
        """Return how many sentences there are."""
        return len(self.sentences)

    def sequence_sizes(self, chosen: Indices, _step: int, /) -> Indices:
        """Return the tokens of chosen sentences, and again, int64 ``[2 n]``."""
        once = [len(self.sentences[index]) for index in chosen.tolist()]
        return np.array(once * 2, dtype=np.int64)

    def terms(self, chosen: Indices) -> int:
        """Return how many examples are chosen."""
        return len(chosen)

    def task_batch(self, chosen: Indices, _step: int, /) -> TaskBatch:
        """Return chosen sentences, all of them once and then all of them again."""
        once = [self.sentences[index] for index in chosen.tolist()]
        return TaskBatch(
            task=self.task,
            tokens=np.concatenate(once * 2),
            sizes=np.array([len(sentence) for sentence in once * 2]),
            columns=2,
            labels=None,
        )
