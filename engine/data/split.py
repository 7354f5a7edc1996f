"""A split of a task as token ids, for sampling and packing."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ..utils.arrays import Indices, ranges
from ..utils.errors import InputError
from .table import Table, strata
from .task_batch import AnswerSpans, Labels, TaggedTokens, TaskBatch, TextIds
from .task_schema import TaskSchema
from .tokenizer import EncodedTexts, Tokenizer
from .windows import Spans, windows_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedSplit:
    """The n examples of a split, each of ``columns`` sentences.

    Attributes:
        task: the task's name.
        ids: the ``id`` of each example.
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
        token_types: uint8 ``[T]``, the segment of each token; None where all are 0.
        states: fp32 ``[T, H]``, hidden states of a frozen encoder (engine/training/precompute.py).
        word_offsets: int64 ``[n + 1]``, where words are tagged: example i has words
            ``word_offsets[i]:word_offsets[i + 1]``.
        word_sizes: int32 ``[W]``, their tokens; 0 of a word that was cut off.
        text_ids: int64 ``[n, c]``, of retrieval: a number for each text, the same for texts of the
            same tokens.
        spans: of question answering, whose examples are windows; several may be of one question,
            and have its id.
        all_pieces: whether batches have the tags of all tokens of a word, not of the first alone.
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
    word_offsets: npt.NDArray[np.int64] | None = None
    word_sizes: npt.NDArray[np.int32] | None = None
    text_ids: npt.NDArray[np.int64] | None = None
    spans: Spans | None = None
    all_pieces: bool = False

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
            labels=self._labels(chosen, sizes),
            token_types=None if types is None else types[places].astype(np.int64),
            states=None if self.states is None else self.states[places],
        )


def tokenize(
    task: str, table: Table, tokenizer: Tokenizer, max_length: int, *, with_text_ids: bool = False
) -> TokenizedSplit:
    """Tokenize a table.

    Args:
        task: the task's name.
        table: the rows.
        tokenizer: what to split them with.
        max_length: the most tokens in a sentence, ``[CLS]`` and ``[SEP]`` included.
        with_text_ids: number the texts, as retrieval needs it.
    """
    word_offsets = word_sizes = None
    if table.words is None:
        by_example = [text for texts in zip(*table.sentences, strict=True) for text in texts]
        encoded = tokenizer.encode(by_example, max_length)
    else:
        encoded, word_sizes = tokenizer.encode_words(table.words, max_length)
        word_offsets = np.concatenate(([0], np.cumsum([len(words) for words in table.words])))
    text_ids = None
    if with_text_ids:
        text_ids = _text_ids(encoded).reshape(len(table), len(table.sentences))
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
        word_offsets=word_offsets,
        word_sizes=word_sizes,
        text_ids=text_ids,
    )


def tokenize_by_schema(
    form: TaskSchema, table: Table, tokenizer: Tokenizer, max_length: int
) -> TokenizedSplit:
    """Tokenize a table as its task needs it: numbered texts of retrieval, windows of contexts.

    Args:
        form: the task's schema.
        table: the rows, read by it.
        tokenizer: what to split them with.
        max_length: the most tokens in a sequence, ``[CLS]`` and ``[SEP]`` included.

    Raises:
        InputError: the limit is too low for a question and a context.
    """
    if form.labels != "spans":
        numbered = form.labels == "none"
        return tokenize(form.task, table, tokenizer, max_length, with_text_ids=numbered)
    questions, contexts = table.sentences
    overlap = form.window_overlap
    found = windows_of(questions, contexts, table.answers, tokenizer, max_length, overlap)
    rows, tokens = found.spans.rows, found.encoded.tokens
    notes = table.notes
    if len(rows) > len(table):
        notes = (*notes, f"{len(rows):,} windows of {len(table):,} questions' contexts")
    return TokenizedSplit(
        task=form.task,
        ids=[table.ids[row] for row in rows.tolist()],
        columns=1,
        tokens=tokens.astype(np.uint16) if tokenizer.vocab_size <= 1 << 16 else tokens,
        offsets=found.encoded.offsets,
        # Of each window, for subsets that keep the share of those without an answer.
        labels=None if table.labels is None else (found.spans.targets[:, 0] > 0).astype(np.float32),
        truncated=found.encoded.truncated,
        bad_rows=dict(table.bad_rows),
        blank=table.blank,
        notes=notes,
        token_types=found.token_types,
        spans=found.spans,
    )


def _text_ids(encoded: EncodedTexts) -> npt.NDArray[np.int64]:
    """Return a number for each text, equal for equal tokens: that of the first such text."""
    tokens, numbers = encoded.tokens.tobytes(), dict[bytes, int]()
    bounds = (encoded.offsets * encoded.tokens.itemsize).tolist()
    found = (
        numbers.setdefault(tokens[start:stop], number)
        for number, (start, stop) in enumerate(pairwise(bounds))
    )
    return np.fromiter(found, dtype=np.int64, count=len(bounds) - 1)


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
