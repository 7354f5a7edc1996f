"""The sequences of an objective, made of its texts piece by piece."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np

from ..utils.arrays import Indices, offsets_of
from .masked_text import following_segments, has_words
from .prepare import prepared
from .raw_text import cut_off, divided, framed, joined, token_ids
from .rows import Piece, as_pieces
from .sequences import token_dtype
from .tokenized import Array
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceSettings:
    """What decides the sequences of an objective, but for its texts.

    Attributes:
        kind: of the objective.
        max_length: the most tokens in a sequence.
        join: how many short texts become one.
        short: the most tokens of a short text.
        divide: whether a text that is longer than a sequence becomes several.
    """

    kind: Literal["masked_lm", "masked_lm_next", "simcse"]
    max_length: int
    join: int
    short: int
    divide: bool

    @property
    def columns(self) -> int:
        """Sequences of an example."""
        return 2 if self.kind == "masked_lm_next" else 1

    def __call__(self, piece: Piece, tokenizer: Tokenizer) -> list[tuple[int, Indices]]:
        """Return the sequences of each text of a piece, and the number of the text."""
        if self.kind == "simcse":
            return list(enumerate(framed(tokenizer, piece.content, self.max_length)))
        if self.kind == "masked_lm":
            return list(enumerate(token_ids(tokenizer, piece.content)))
        return [
            (number, segment)
            for number, text in enumerate(piece.content, start=piece.first_row)
            for segment in chain.from_iterable(following_segments(text, tokenizer, self.max_length))
        ]


def write_sequences(
    texts: Iterable[str],
    settings: SequenceSettings,
    tokenizer: Tokenizer,
    append: Callable[[str, Array], None],
    workers: int = 0,
) -> None:
    """Write the sequences of texts as the arrays ``tokens``, ``offsets`` and ``texts`` of an entry.

    Args:
        texts: sentences or documents.
        settings: of the objective.
        tokenizer: what to split them with.
        append: is given the name of an array and further rows of it.
        workers: processes; 0 for as many as there are cores.
    """
    dtype, end = token_dtype(tokenizer.vocab_size), 0
    append("offsets", np.zeros(1, dtype=np.int64))
    for several in as_pieces(_sequences(texts, settings, tokenizer, workers)):
        numbers, sequences = zip(*several.content, strict=True)
        offsets = offsets_of([len(sequence) for sequence in sequences])
        append("tokens", np.concatenate(sequences).astype(dtype))
        append("offsets", offsets[1:] + end)
        append("texts", np.array(numbers[:: settings.columns], dtype=np.int64))
        end += int(offsets[-1])


def _sequences(
    texts: Iterable[str], settings: SequenceSettings, tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[int, Indices]]:
    found = chain.from_iterable(prepared(as_pieces(texts), settings, tokenizer, workers))
    if settings.kind != "masked_lm":
        return found
    most = settings.max_length - 2
    cut = divided if settings.divide else cut_off
    pieces = cut((piece for _, piece in found), most)
    whole = (piece for piece in pieces if has_words(piece, tokenizer))
    return enumerate(joined(whole, settings.join, most, settings.short))
