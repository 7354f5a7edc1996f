"""A split of a task as token ids, for sampling and packing."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..utils.errors import InputError
from .table import Table
from .task_batch import Indices, TaskBatch, ranges
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
        notes: what was found out about the file, a line each.
        token_types: uint8 ``[T]``, the segment of each token; None where all are 0.
        states: fp32 ``[T, H]``, hidden states of a frozen encoder (engine/training/precompute.py).
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
    notes: tuple[str, ...] = ()
    token_types: npt.NDArray[np.uint8] | None = None
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
        """Number of rows of the file that were skipped or blanked."""
        return sum(self.bad_rows.values())

    def task_batch(self, chosen: Indices, _step: int, /) -> TaskBatch:
        """Return chosen examples; nothing about them is random."""
        columns = np.arange(self.columns)[:, None]
        sequences = (chosen * self.columns + columns).reshape(-1)
        starts = self.offsets[sequences]
        sizes = self.offsets[sequences + 1] - starts
        places, types = ranges(starts, sizes), self.token_types
        return TaskBatch(
            task=self.task,
            tokens=self.tokens[places].astype(np.int64),
            sizes=sizes,
            columns=self.columns,
            labels=None if self.labels is None else torch.from_numpy(self.labels[chosen]),
            token_types=None if types is None else types[places].astype(np.int64),
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
        notes=table.notes,
    )


def join_pairs(split: TokenizedSplit, tokenizer: Tokenizer, max_length: int) -> TokenizedSplit:
    """Make one sequence, ``[CLS] A [SEP] B [SEP]``, of the two sentences of each example.

    B is segment 1, behind one separator; RoBERTa has two, and no segments.  Pairs that are too long
    lose tokens at the end of the longer sentence until both are equally long, then of both.

    Args:
        split: of c = 2 columns.
        tokenizer: what it was split with.
        max_length: the most tokens in a sequence.

    Raises:
        InputError: the limit leaves no room for a token of each sentence.
    """
    separators = tokenizer.pair_separators
    room = max_length - separators - 2
    if room < 2:
        raise InputError(
            f"max_length = {max_length}: expected {separators + 4} or more for a pair in a sequence"
        )
    starts = split.offsets[:-1].reshape(-1, 2)
    own = split.lengths.reshape(-1, 2) - 2  # without [CLS] and [SEP]
    shorter = np.minimum(own.min(axis=1), room // 2)
    longer = np.minimum(own.max(axis=1), room - shorter)
    kept = np.stack([shorter, longer], axis=1)
    first_is_longer = own[:, 0] > own[:, 1]
    kept[first_is_longer] = kept[first_is_longer, ::-1]

    last = starts + own + 1  # each sentence's own [SEP]
    first, second = [starts[:, 0], *[last[:, 0]] * separators], [starts[:, 1] + 1, last[:, 1]]
    one = np.ones_like(own[:, 0])
    sizes = np.stack([kept[:, 0] + 1, *[one] * separators, kept[:, 1], one], axis=1)
    places = ranges(np.stack([*first, *second], axis=1).reshape(-1), sizes.reshape(-1))
    segments = np.array([*[0] * len(first), *[1] * len(second)], dtype=np.uint8)
    return replace(
        split,
        columns=1,
        tokens=split.tokens[places],
        offsets=np.concatenate(([0], np.cumsum(sizes.sum(axis=1)))),
        token_types=(
            np.repeat(np.tile(segments, len(split)), sizes.reshape(-1)) if separators == 1 else None
        ),
        truncated=int((kept < own).sum()),
    )
