"""A split of a task as token ids: what sampling and packing work on."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .part import Indices, Part, ranges
from .read import Table
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSplit:
    """The n examples of a split, each of ``columns`` sentences.

    Attributes:
        task: the task's name.
        ids: the ``id`` of each example.
        columns: sentences in an example, c: 1 or 2.
        tokens: uint16 or int32 ``[T]``, all sentences one after the other; memory-mapped where
            the split comes from the cache.
        offsets: int64 ``[n * c + 1]``; sentence j of example i is sequence ``s = i * c + j`` and
            stands in ``tokens[offsets[s]:offsets[s + 1]]``.
        labels: float32 ``[n]``, or None.
        truncated: how many sentences were cut to the limit on the length.
        bad_rows: how many rows of the file were skipped or blanked, by reason.
        blank: the indices of the blanked rows.
        states: fp32 ``[T, H]``, what a frozen encoder made of the tokens (engine/frozen.py).
    """

    task: str
    ids: list[str]
    columns: int
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32] | None
    truncated: int
    bad_rows: dict[str, int]
    blank: tuple[int, ...]
    states: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        """Return n, the number of examples."""
        return len(self.ids)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sequence, int64 ``[n * c]``."""
        return np.diff(self.offsets)

    @property
    def skipped(self) -> int:
        """How many rows of the file were skipped or blanked."""
        return sum(self.bad_rows.values())

    def part(self, chosen: Indices, _step: int, /) -> Part:
        """Return chosen examples; nothing about them is random."""
        columns = np.arange(self.columns)[:, None]
        sequences = (chosen * self.columns + columns).reshape(-1)
        starts = self.offsets[sequences]
        sizes = self.offsets[sequences + 1] - starts
        places = ranges(starts, sizes)
        return Part(
            task=self.task,
            tokens=self.tokens[places].astype(np.int64),
            sizes=sizes,
            columns=self.columns,
            labels=None if self.labels is None else torch.from_numpy(self.labels[chosen]),
            states=None if self.states is None else self.states[places],
        )


def tokenize(task: str, table: Table, tokenizer: Tokenizer, max_length: int) -> TokenizedSplit:
    """Tokenize a table.

    Args:
        task: the task's name.
        table: the rows.
        tokenizer: what to split them with.
        max_length: the most tokens in a sentence, ``[CLS]`` and ``[SEP]`` included.
    """
    by_example = [text for texts in zip(*table.sentences, strict=True) for text in texts]
    encoded = tokenizer.encode(by_example, max_length)
    fits_16_bits = tokenizer.vocab_size <= 1 << 16
    return TokenizedSplit(
        task=task,
        ids=table.ids,
        columns=len(table.sentences),
        tokens=encoded.tokens.astype(np.uint16) if fits_16_bits else encoded.tokens,
        offsets=encoded.offsets,
        labels=table.labels,
        truncated=encoded.truncated,
        bad_rows=dict(table.bad_rows),
        blank=table.blank,
    )
