"""Examples of masked language modelling, with next sentence prediction or without.

Devlin et al. (2019, section 3.1): 15 % of the tokens of a sequence are predicted; of these 80 %
become [MASK], 10 % a random token, and 10 % stay.  With next sentence prediction a sequence is
``[CLS] A [SEP] B [SEP]``, where B follows A in half of the examples and is drawn from another text
in the others.  Masks and draws are functions of seed, step and example: each pass over the text has
other masks, and a resumed run the same ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ..utils.arrays import Indices
from ..utils.errors import InputError
from ..utils.rng import uniforms
from .raw_text import NOT_KNOWN, Found, joined, split_sentences, token_ids
from .task_batch import MaskedTokens, TaskBatch
from .tokenizer import Tokenizer

_TO_MASK, _TO_RANDOM = 0.8, 0.9


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
    """

    task: str
    examples: Sequence[Segments]
    tokenizer: Tokenizer
    mask_share: float
    seed: int
    found: Found = NOT_KNOWN

    def __len__(self) -> int:
        """Return how many examples there are."""
        return len(self.examples)

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
        special = (self.tokenizer.cls_id, self.tokenizer.sep_id)
        candidates = np.flatnonzero(~np.isin(sequence, special))
        order, action, instead = uniforms(
            3 * len(candidates), self.seed, self.task, "mask", step, index
        ).reshape(3, -1)
        count = max(1, round(self.mask_share * len(candidates)))
        picked = np.sort(np.argsort(order, kind="stable")[:count])
        changed = sequence[candidates[picked]]
        random_tokens = (instead[picked] * self.tokenizer.vocab_size).astype(np.int64)
        changed = np.where(action[picked] < _TO_RANDOM, random_tokens, changed)
        changed = np.where(action[picked] < _TO_MASK, self.tokenizer.mask_id, changed)
        return candidates[picked], changed


def single_segments(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int, join: int, short: int
) -> list[Segments]:
    """Return a segment for each text, or for ``join`` together of up to ``short`` tokens each."""
    pieces = [piece for piece in token_ids(tokenizer, texts) if len(piece)]
    return [
        Segments(number, piece, None)
        for number, piece in enumerate(joined(pieces, join, max_length - 2, short))
    ]


def following_segments(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int
) -> list[Segments]:
    """Return pairs of neighbouring segments out of each text, whole sentences each.

    Args:
        texts: documents of several sentences; those of one give nothing.
        tokenizer: what to split them with.
        max_length: the most tokens in a sequence; a segment takes up to half of it.

    Raises:
        InputError: fewer than two texts have a second sentence.
    """
    half = (max_length - 3) // 2
    found: list[Segments] = []
    for number, text in enumerate(texts):
        pieces = [piece for piece in token_ids(tokenizer, split_sentences(text)) if len(piece)]
        halves = len(pieces) if sum(map(len, pieces)) > 2 * half else -(-len(pieces) // 2)
        segments = list(joined(pieces, max(1, halves), half, half))
        found += [
            Segments(number, first, second)
            for first, second in zip(segments[::2], segments[1::2], strict=False)
        ]
    if len({segments.text for segments in found}) < 2:
        raise InputError(
            "next sentence prediction: fewer than two texts have more than one sentence; "
            "give documents, one a line, in objectives.NAME.files"
        )
    return found
