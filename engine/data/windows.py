"""Windows of contexts: sequences ``[CLS] question [SEP] part of a context [SEP]``.

A context that is too long for a sequence is divided into overlapping windows, as in BERT's own
program for SQuAD (Devlin et al. 2019, arXiv:1810.04805, section 4.2, and its ``run_squad.py``).
Each window is an example of its own in training: it points to its answer, or to ``[CLS]`` where the
answer is not, or not wholly, within it.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..utils.arrays import Indices, ranges
from ..utils.errors import InputError
from .squad import Span
from .tokenizer import EncodedTexts, Tokenizer

_LONGEST = 1 << 24
"""Characters of a context, whose numbers float32 holds."""


class Spans(NamedTuple):
    """The windows of R questions: n sequences of T tokens, C different contexts, A answers.

    Attributes:
        rows: int64 ``[n]``, the question of each window, ascending.
        places: int32 ``[T, 2]``, the first character of each token in its context, and the one
            behind its last; -1 of tokens that are not of the context.
        targets: int64 ``[n, 2]``, the first and last token of the answer, counted from the window's
            ``[CLS]``; 0 where it has none.
        context_of: int64 ``[R]``, the context of each question.
        context_bytes: uint8, the contexts in UTF-8, one after the other.
        context_offsets: int64 ``[C + 1]``; context c is ``context_bytes[context_offsets[c]:
            context_offsets[c + 1]]``.
        answers: int64 ``[A, 2]``, the characters of each answer.
        answer_offsets: int64 ``[R + 1]``; question r has the answers
            ``answer_offsets[r]:answer_offsets[r + 1]``.
    """

    rows: Indices
    places: npt.NDArray[np.int32]
    targets: Indices
    context_of: Indices
    context_bytes: npt.NDArray[np.uint8]
    context_offsets: Indices
    answers: Indices
    answer_offsets: Indices

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.context_of)

    def context(self, row: int) -> str:
        """Return the context of a question."""
        number = self.context_of[row]
        start, stop = self.context_offsets[number : number + 2]
        return self.context_bytes[start:stop].tobytes().decode()

    def answers_to(self, row: int) -> list[str]:
        """Return the texts of the answers of the data."""
        start, stop = self.answer_offsets[row : row + 2]
        context = self.context(row)
        return [context[first:end] for first, end in self.answers[start:stop].tolist()]


class Windows(NamedTuple):
    """Windows as sequences.

    Attributes:
        encoded: the n sequences; ``truncated`` counts questions that were cut.
        token_types: uint8 ``[T]``, 1 of the context and the separator behind it; None where the
            model has no segments.
        spans: what is known of them.
    """

    encoded: EncodedTexts
    token_types: npt.NDArray[np.uint8] | None
    spans: Spans


def windows_of(
    questions: Sequence[str],
    contexts: Sequence[str],
    answers: Sequence[Sequence[Span]] | None,
    tokenizer: Tokenizer,
    max_length: int,
    overlap: int,
) -> Windows:
    """Tokenize questions with their contexts.

    A question may take half of a sequence, and loses its end where it is longer.

    Args:
        questions: R of them.
        contexts: of each.
        answers: to each, as characters of its context, of which the first is trained on; None where
            they are not known.
        tokenizer: what to split the texts with.
        max_length: the most tokens in a sequence.
        overlap: tokens that two neighbouring windows share, at most half of a window's.

    Raises:
        InputError: the limit is too low for a token of each, or a context is too long.
    """
    separators = tokenizer.pair_separators
    free = max_length - separators - 2
    if free < 2:
        raise InputError(
            f"max_length = {max_length}: expected {separators + 4} or more for a question and a "
            "context in a sequence"
        )
    for number, context in enumerate(contexts):
        if len(context) > _LONGEST:
            raise InputError(f"context {number}: of more than {_LONGEST:,} characters; divide it")
    asked, _ = tokenizer.encode_with_places(questions)
    different = list(dict.fromkeys(contexts))
    numbers = {context: number for number, context in enumerate(different)}
    told, places = tokenizer.encode_with_places(different)
    context_of = np.array([numbers[context] for context in contexts], dtype=np.int64)

    asked_sizes = np.diff(asked.offsets)
    question_sizes = np.minimum(asked_sizes, free // 2)
    context_sizes = np.diff(told.offsets)[context_of]
    widths = free - question_sizes  # of a window of the context
    steps = widths - np.minimum(overlap, widths // 2)
    counts = 1 + np.maximum(0, -(-(context_sizes - widths) // steps))
    rows = np.repeat(np.arange(len(questions)), counts)
    starts = ranges(np.zeros_like(counts), counts) * steps[rows]
    sizes = np.minimum(context_sizes[rows] - starts, widths[rows])
    firsts = told.offsets[context_of[rows]] + starts

    # The pieces of a window, one after the other: [CLS], question, separators, context, [SEP].
    one = np.ones_like(sizes)
    frame = np.array([tokenizer.cls_id, tokenizer.sep_id], dtype=np.int32)
    pool = np.concatenate([frame, asked.tokens, told.tokens])
    from_question, from_context = 2 + asked.offsets[rows], 2 + len(asked.tokens) + firsts
    pieces = [(0 * one, one), (from_question, question_sizes[rows])]
    pieces += [(one, one)] * separators + [(from_context, sizes), (one, one)]
    piece_sizes = np.stack([size for _, size in pieces], axis=1)
    piece_starts = np.stack([start for start, _ in pieces], axis=1)
    taken = ranges(piece_starts.reshape(-1), piece_sizes.reshape(-1))
    of_context = taken - 2 - len(asked.tokens)
    own_places = np.full((len(taken), 2), -1, dtype=np.int32)
    own_places[of_context >= 0] = places[of_context[of_context >= 0]]
    segments = np.array([*[0] * (len(pieces) - 2), 1, 1], dtype=np.uint8)
    types = np.repeat(np.tile(segments, len(rows)), piece_sizes.reshape(-1))
    lengths = piece_sizes.sum(axis=1)

    before = lengths - 1 - sizes  # tokens of a window in front of its context
    targets = np.zeros((len(rows), 2), dtype=np.int64)
    for window, row in enumerate(rows.tolist()):
        if answers is not None and answers[row]:
            bounds = told.offsets[context_of[row] : context_of[row] + 2]
            found = _tokens_of(answers[row][0], places[slice(*bounds)])
            found = None if found is None else found - starts[window]
            if found is not None and found[0] >= 0 and found[1] < sizes[window]:
                targets[window] = before[window] + found
    encoded_contexts = [context.encode() for context in different]
    listed = [[] for _ in questions] if answers is None else answers
    return Windows(
        EncodedTexts(
            pool[taken],
            np.concatenate(([0], np.cumsum(lengths))),
            int((question_sizes < asked_sizes).sum()),
        ),
        types if separators == 1 else None,
        Spans(
            rows=rows,
            places=own_places,
            targets=targets,
            context_of=context_of,
            context_bytes=np.frombuffer(b"".join(encoded_contexts), dtype=np.uint8),
            context_offsets=_offsets(encoded_contexts),
            answers=np.array(list(chain.from_iterable(listed)), dtype=np.int64).reshape(-1, 2),
            answer_offsets=_offsets(listed),
        ),
    )


def _tokens_of(answer: Span, places: npt.NDArray[np.int32]) -> Indices | None:
    """Return the first and last token that share a character with an answer; None without any."""
    found = np.flatnonzero((places[:, 1] > answer[0]) & (places[:, 0] < answer[1]))
    return found[[0, -1]] if len(found) else None


def _offsets(items: Sequence[Sequence[object]]) -> Indices:
    return np.concatenate(([0], np.cumsum([len(item) for item in items], dtype=np.int64)))
