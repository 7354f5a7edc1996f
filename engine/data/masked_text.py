"""Examples of masked language modelling, with next sentence prediction or without.

Devlin et al. (2019, section 3.1): 15 % of the tokens of a sequence are predicted; of these 80 %
become [MASK], 10 % a random token, and 10 % stay.  With next sentence prediction a sequence is
``[CLS] A [SEP] B [SEP]``, where B follows A in half of the examples and is drawn from another text
in the others.  Masks and draws are functions of seed, step and example: each pass over the text has
other masks, and a resumed run the same ones.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt
import torch

from ..utils.arrays import Indices
from ..utils.errors import InputError
from ..utils.rng import uniforms
from .raw_text import NOT_KNOWN, Found, joined, split_sentences, token_ids
from .sequences import PackedSequences
from .task_batch import MaskedTokens, TaskBatch
from .tokenizer import Tokenizer

_TO_MASK, _TO_RANDOM = 0.8, 0.9

Draws = npt.NDArray[np.float64]


class Segments(NamedTuple):
    """The text of an example: one segment, or two that follow one another."""

    text: int
    first: Indices
    second: Indices | None


@dataclass(frozen=True, slots=True)
class MaskedText:
    """Examples of masked LM, which batches are drawn from.

    Attributes:
        task: the objective's name.
        examples: their text, as token ids.
        tokenizer: for the special tokens.
        mask_share: of the tokens of a sequence that are to be told.
        seed: decides, with step and example, what is masked.
        found: where the text comes from.
        whole_words: whether all tokens of a word are masked, or none.

    Raises:
        InputError: whole words are to be masked, and the tokenizer does not tell where they begin.
    """

    task: str
    examples: "PackedSegments"
    tokenizer: Tokenizer
    mask_share: float
    seed: int
    found: Found = NOT_KNOWN
    whole_words: bool = False

    def __post_init__(self) -> None:
        if self.whole_words:
            _ = self.tokenizer.begins_word

    def __len__(self) -> int:
        """Return how many examples there are."""
        return len(self.examples)

    @property
    def sizes(self) -> Indices:
        """The tokens of each example's sequence, int64 ``[N]``."""
        columns = self.examples.columns
        own = np.diff(self.examples.sequences.offsets).reshape(-1, columns).sum(axis=1)
        return own + columns + 1  # [CLS], and [SEP] behind each segment

    def sequence_sizes(self, chosen: Indices, step: int, /) -> Indices:
        """Return the tokens of each chosen example's sequence in ``step``, int64 ``[n]``."""
        if self.examples.columns == 1:
            offsets = self.examples.sequences.offsets
            return offsets[chosen + 1] - offsets[chosen] + 2  # [CLS] and [SEP]
        return self.task_batch(chosen, step).sizes  # a second segment may be another example's

    def terms(self, chosen: Indices) -> int:
        """Return how many examples are chosen."""
        return len(chosen)

    def task_batch(self, chosen: Indices, step: int, /) -> TaskBatch:
        """Return chosen examples under the masks of ``step``."""
        sequences, types, positions, targets, is_next = [], [], [], [], []
        start = 0
        for index in chosen.tolist():
            second, follows = self._second(index, step)
            first = self.examples[index].first
            sequence, segment = self._frame(first, second)
            picked, changed = self._mask(sequence, index, step)
            positions.append(picked + start)
            targets.append(sequence[picked])
            sequence[picked] = changed
            sequences.append(sequence)
            types.append(segment)
            is_next.append(follows)
            start += len(sequence)
        two = self.examples[0].second is not None
        return TaskBatch(
            task=self.task,
            tokens=np.concatenate(sequences),
            sizes=np.array([len(sequence) for sequence in sequences]),
            columns=1,
            labels=MaskedTokens(
                torch.from_numpy(np.concatenate(positions)),
                torch.from_numpy(np.concatenate(targets)),
                torch.tensor(is_next, dtype=torch.float32) if two else None,
            ),
            token_types=np.concatenate(types),
        )

    def _second(self, index: int, step: int) -> tuple[Indices | None, bool]:
        """Return the second segment, and whether it follows the first in the text."""
        own = self.examples[index]
        if own.second is None:
            return None, False
        coin, place = uniforms(2, self.seed, self.task, "next", step, index)
        if coin < 0.5:
            return own.second, True
        other = int(place * len(self))
        while self.examples[other].text == own.text:
            other = (other + 1) % len(self)
        return self.examples[other].second, False

    def _frame(self, first: Indices, second: Indices | None) -> tuple[Indices, Indices]:
        """Return ``[CLS] A [SEP]`` or ``[CLS] A [SEP] B [SEP]``, and each token's segment."""
        cls, sep = np.array([self.tokenizer.cls_id]), np.array([self.tokenizer.sep_id])
        parts = [cls, first, sep] if second is None else [cls, first, sep, second, sep]
        sequence = np.concatenate(parts)
        segment = np.zeros_like(sequence)
        segment[len(first) + 2 :] = 1
        return sequence, segment

    def _mask(self, sequence: Indices, index: int, step: int) -> tuple[Indices, Indices]:
        """Return the positions of the predicted tokens, and the tokens that replace them."""
        candidates = np.flatnonzero(_are_told(sequence, self.tokenizer))
        order, action, instead = uniforms(
            3 * len(candidates), self.seed, self.task, "mask", step, index
        ).reshape(3, -1)
        count = max(1, round(self.mask_share * len(candidates)))
        picked = np.sort(self._drawn(sequence[candidates], order, count))
        changed = sequence[candidates[picked]]
        random_tokens = (instead[picked] * self.tokenizer.vocab_size).astype(np.int64)
        changed = np.where(action[picked] < _TO_RANDOM, random_tokens, changed)
        changed = np.where(action[picked] < _TO_MASK, self.tokenizer.mask_id, changed)
        return candidates[picked], changed

    def _drawn(self, tokens: Indices, order: Draws, count: int) -> Indices:
        """Return which tokens are drawn: ``count``, or of whole words at most so many, and one."""
        if not self.whole_words:
            return np.argsort(order, kind="stable")[:count]
        begins = self.tokenizer.begins_word[tokens]
        begins[0] = True  # of a word that another sequence has the beginning of
        words = np.cumsum(begins) - 1
        sizes = np.bincount(words)
        shuffled = np.argsort(order[begins], kind="stable")
        left, taken = count, np.zeros(len(sizes), dtype=bool)
        # As in BERT, a word that is too long for what is left is not drawn.
        for word in shuffled.tolist():
            if sizes[word] <= left:
                taken[word] = True
                left -= sizes[word]
            if not left:
                break
        taken[shuffled[0]] |= not taken.any()
        return np.flatnonzero(taken[words])


@dataclass(frozen=True, slots=True, eq=False)
class PackedSegments(Sequence[Segments]):
    """The text of N examples, each of c segments.

    Attributes:
        sequences: the segments, N * c; those of an example follow one another.
        columns: c, 1 or 2.
        texts: int64 ``[N]``, the number of the text that each is from.
    """

    sequences: PackedSequences
    columns: int
    texts: Indices

    def __len__(self) -> int:
        """Return N."""
        return len(self.texts)

    @overload
    def __getitem__(self, index: int) -> Segments: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segments]: ...
    def __getitem__(self, index: int | slice) -> Segments | Sequence[Segments]:
        """Return an example's text, or that of several."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        first = self.sequences[number * self.columns]
        second = self.sequences[number * 2 + 1] if self.columns == 2 else None
        return Segments(int(self.texts[number]), first, second)


def _are_told(tokens: Indices, tokenizer: Tokenizer) -> npt.NDArray[np.bool_]:
    """Return which tokens may be masked: not [CLS] and [SEP], not even where a text spells them."""
    return ~np.isin(tokens, (tokenizer.cls_id, tokenizer.sep_id))


def has_words(tokens: Indices, tokenizer: Tokenizer) -> bool:
    """Return whether there is a token that may be masked."""
    return bool(_are_told(tokens, tokenizer).any())


def following_segments(
    text: str, tokenizer: Tokenizer, max_length: int
) -> Iterator[tuple[Indices, Indices]]:
    """Yield pairs of neighbouring segments out of a text, whole sentences each.

    Args:
        text: a document of several sentences; of one it gives nothing.
        tokenizer: what to split it with.
        max_length: the most tokens in a sequence; a segment takes up to half of it.
    """
    half = (max_length - 3) // 2
    ids = token_ids(tokenizer, split_sentences(text))
    pieces = [piece for piece in ids if has_words(piece, tokenizer)]
    halves = len(pieces) if sum(map(len, pieces)) > 2 * half else -(-len(pieces) // 2)
    segments = list(joined(pieces, max(1, halves), half, half))
    return zip(segments[::2], segments[1::2], strict=False)


def check_texts_follow(texts: Indices) -> None:
    """Check that pairs of segments are of several texts, so that one can follow another's.

    Args:
        texts: of each pair the number of its text.

    Raises:
        InputError: fewer than two texts have a second sentence.
    """
    if len(np.unique(texts)) < 2:
        raise InputError(
            "next sentence prediction: fewer than two texts have more than one sentence; "
            "give documents, one a line, in objectives.NAME.files"
        )
