"""A split of a task as token ids, for sampling and packing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..utils.arrays import Indices, ranges
from .table import Table, strata
from .task_batch import AnswerSpans, Labels, TaggedTokens, TaskBatch, TextIds
from .task_schema import TaskSchema
from .tokenized import (
    SPANS,
    TEXT_KEYS,
    Array,
    Joiner,
    Totals,
    spans_of_arrays,
    text_ids,
    tokenize_table,
)
from .tokenizer import Tokenizer
from .windows import Spans


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSplit:
    """The n examples of a split, each of ``columns`` sentences.

    Attributes:
        task: the task's name.
        examples: n; of question answering windows, of which several may be of one question.
        columns: sentences in an example, c: 1 or 2, of retrieval 2 or more.
        tokens: uint16 or int32 ``[T]``, all sentences one after the other; memory-mapped where
            the split comes from the cache.
        offsets: int64 ``[n * c + 1]``; sentence j of example i is sequence ``s = i * c + j`` and
            stands in ``tokens[offsets[s]:offsets[s + 1]]``.
        labels: float32 ``[n]``, of several labels ``[n, L]``, of tagged words ``[W]``; or None.
        truncated: how many sentences were cut to the limit on the length.
        bad_rows: how many rows of the file were skipped or blanked, by reason.
        blank: the indices of the blanked rows.
        notes: what was found out about the file, a line each.
        first_bad: what was wrong with the first row that was skipped or blanked, and where it is.
        token_types: uint8 ``[T]``, the segment of each token; None where all are 0.
        states: fp32 ``[T, H]``, hidden states of a frozen encoder (engine/training/precompute.py).
        word_offsets: int64 ``[n + 1]``, where words are tagged: example i has words
            ``word_offsets[i]:word_offsets[i + 1]``.
        word_sizes: int32 ``[W]``, their tokens; 0 of a word that was cut off.
        text_ids: int64 ``[n, c]``, of retrieval: a number for each text, the same for texts of the
            same tokens.
        spans: of question answering, whose examples are windows.
        all_pieces: whether batches have the tags of all tokens of a word, not of the first alone.
    """

    task: str
    examples: int
    columns: int
    tokens: npt.NDArray[np.uint16] | npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32] | None
    truncated: int
    bad_rows: dict[str, int]
    blank: tuple[int, ...]
    notes: tuple[str, ...] = ()
    first_bad: str = ""
    token_types: npt.NDArray[np.uint8] | None = None
    states: npt.NDArray[np.float32] | None = None
    word_offsets: npt.NDArray[np.int64] | None = None
    word_sizes: npt.NDArray[np.int32] | None = None
    text_ids: npt.NDArray[np.int64] | None = None
    spans: Spans | None = None
    all_pieces: bool = False

    def __len__(self) -> int:
        """Return n, the number of examples."""
        return self.examples

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each sequence, int64 ``[n * c]``."""
        return np.diff(self.offsets)

    @property
    def skipped(self) -> int:
        """Number of rows of the file that were skipped or blanked."""
        return sum(self.bad_rows.values())

    @property
    def answer_offsets(self) -> npt.NDArray[np.int64]:
        """Which scores are of each example, int64 ``[n + 1]``: one, or one a word or token."""
        if self.spans is not None:
            return self.offsets
        return np.arange(len(self) + 1) if self.word_offsets is None else self.word_offsets

    @property
    def unseen(self) -> npt.NDArray[np.bool_]:
        """Bool ``[N]``, the answers that the model does not give: of words without a token."""
        if self.word_sizes is None:
            return np.zeros(len(self), dtype=bool)
        return np.asarray(self.word_sizes == 0)

    @property
    def strata(self) -> npt.NDArray[np.float32]:
        """A number for each example, equal for those with equal labels."""
        assert self.labels is not None, f"split of {self.task} has no labels"
        return strata(self.labels, len(self))

    def terms(self, chosen: Indices, /) -> int:
        """Return how many terms the mean loss of chosen examples has."""
        if self.word_offsets is None or self.word_sizes is None:
            return len(chosen)
        sizes = self.word_sizes[ranges(self.word_offsets[chosen], self._words_of(chosen))]
        return int(sizes.sum() if self.all_pieces else np.count_nonzero(sizes))

    def label_counts(self, chosen: Indices, classes: int) -> Indices:
        """Return how often each of C classes is a label that chosen examples are trained on.

        Args:
            chosen: of the examples.
            classes: C, or the number L of several labels.

        Returns:
            int64 ``[C]``, of examples, or of the tagged tokens that the loss has terms of;
            ``[L, 2]``, how many examples do not have each of several labels, and do.
        """
        assert self.labels is not None, f"split of {self.task} has no labels"
        if self.word_offsets is not None and self.word_sizes is not None:
            words = ranges(self.word_offsets[chosen], self._words_of(chosen))
            sizes = self.word_sizes[words]
            times = sizes if self.all_pieces else np.minimum(sizes, 1)
            labels = np.repeat(self.labels[words], times)
        else:
            labels = self.labels[chosen]
        if labels.ndim == 2:
            yes = np.count_nonzero(labels, axis=0)
            return np.stack([len(labels) - yes, yes], axis=1)
        return np.bincount(labels.astype(np.int64), minlength=classes)

    def _words_of(self, chosen: Indices) -> Indices:
        assert self.word_offsets is not None
        return self.word_offsets[chosen + 1] - self.word_offsets[chosen]

    def _labels(self, chosen: Indices, sizes: Indices) -> Labels | None:
        """Return the labels of chosen examples, whose sequences have so many tokens."""
        if self.spans is not None:
            ends = np.concatenate(([0], np.cumsum(sizes)))
            first, last = (ends[:-1, None] + self.spans.targets[chosen]).T
            return AnswerSpans(*map(torch.from_numpy, (first.copy(), last.copy(), ends)))
        if self.text_ids is not None:
            return TextIds(torch.from_numpy(self.text_ids[chosen]))
        if self.word_offsets is None or self.word_sizes is None:
            return None if self.labels is None else torch.from_numpy(self.labels[chosen])
        counts = self._words_of(chosen)
        words = ranges(self.word_offsets[chosen], counts)
        own = self.word_sizes[words].astype(np.int64)
        ends = np.cumsum(own)
        bounds = np.concatenate(([0], np.cumsum(counts)))
        before = np.concatenate(([0], ends))[bounds[:-1]]  # tokens of the texts before
        starts = np.cumsum(sizes) - sizes + 1  # behind [CLS]
        first = ends - own + np.repeat(starts - before, counts)
        tags = np.full(len(words), -100) if self.labels is None else self.labels[words]
        tags = np.where(own > 0, tags, -100).astype(np.int64)
        if self.all_pieces:
            positions, tags = ranges(first, own), np.repeat(tags, own)
        else:
            positions = np.where(own > 0, first, -1)
        return TaggedTokens(torch.from_numpy(positions), torch.from_numpy(tags))

    def sequence_sizes(self, chosen: Indices, _step: int, /) -> Indices:
        """Return the tokens of all first sequences of chosen examples, then of all second ones."""
        sequences = self._sequences(chosen)
        return self.offsets[sequences + 1] - self.offsets[sequences]

    def _sequences(self, chosen: Indices) -> Indices:
        return (chosen * self.columns + np.arange(self.columns)[:, None]).reshape(-1)

    def task_batch(self, chosen: Indices, step: int, /) -> TaskBatch:
        """Return chosen examples; nothing about them is random."""
        starts, sizes = self.offsets[self._sequences(chosen)], self.sequence_sizes(chosen, step)
        places, types = ranges(starts, sizes), self.token_types
        return TaskBatch(
            task=self.task,
            tokens=self.tokens[places].astype(np.int64),
            sizes=sizes,
            columns=self.columns,
            labels=self._labels(chosen, sizes),
            token_types=None if types is None else types[places].astype(np.int64),
            states=None if self.states is None else self.states[places],
        )


def tokenize(
    task: str,
    table: Table,
    tokenizer: Tokenizer,
    max_length: int,
    *,
    schema: TaskSchema | None = None,
    joins_pairs: bool = False,
) -> TokenizedSplit:
    """Tokenize a table, in memory; :func:`~.tokenized.tokenize_table`.

    Args:
        task: the task's name.
        table: the rows.
        tokenizer: what to split them with.
        max_length: the most tokens in a sentence, ``[CLS]`` and ``[SEP]`` included.
        schema: of the task, by which texts are numbered or contexts divided; None for sentences of
            no task.
        joins_pairs: make one sequence of the two sentences of each example.

    Raises:
        InputError: the limit is too low for what a sequence has to hold.
    """
    piece = tokenize_table(schema, table, tokenizer, max_length, joins_pairs=joins_pairs)
    arrays = dict(piece.arrays)
    joiner = Joiner(arrays.__setitem__)
    joiner.add(piece)
    return split_of(task, joiner.totals(), arrays, table.notes)


def split_of(
    task: str, totals: Totals, arrays: Mapping[str, Array], notes: Sequence[str]
) -> TokenizedSplit:
    """Return a split of the arrays that its pieces were put together to.

    Args:
        task: the task's name.
        totals: what is counted over the pieces.
        arrays: those of ARRAYS that it has, and of retrieval ``text_ids``, or the keys that these
            are made of.
        notes: what was found out about the file, a line each.
    """
    arrays = dict(arrays)
    if (keys := arrays.pop(TEXT_KEYS, None)) is not None:
        arrays["text_ids"] = text_ids(keys).reshape(totals.examples, -1)
    spans = spans_of_arrays(arrays)
    if spans is not None and totals.examples > totals.rows:
        windows = f"{totals.examples:,} windows of {totals.rows:,} questions' contexts"
        notes = [*notes, windows]
    plain: dict[str, Any] = {"labels": None}
    plain |= {name: array for name, array in arrays.items() if not name.startswith(SPANS)}
    return TokenizedSplit(
        task=task,
        examples=totals.examples,
        columns=totals.columns,
        truncated=totals.truncated,
        bad_rows=totals.bad_rows,
        blank=totals.blank,
        notes=tuple(notes),
        first_bad=totals.first_bad,
        spans=spans,
        **plain,
    )
