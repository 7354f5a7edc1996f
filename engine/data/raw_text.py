"""Text for objectives: the training sentences of tasks, or files with a text a line."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..utils.arrays import Indices
from ..utils.errors import InputError
from ..utils.files import explained
from ..utils.untrusted_io import file_size
from .addresses import Place, opened
from .blocks import Block, blocks_of
from .decode import decode, undecoded
from .decompress import decompressed
from .dialect import BUILT_IN
from .tokenizer import Tokenizer

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
T = TypeVar("T")

_WHOLE = 1 << 30  # tokens: no text is cut before its sequence is put together


class Found(NamedTuple):
    """Texts found for an objective.

    Attributes:
        largest: examples of the largest task, or lines of the largest file.
        texts: of all tasks and files, each cut to the objective's ``max_per_source``.
        notes: warnings about the files, a line each.
    """

    largest: int
    texts: int
    notes: tuple[str, ...] = ()


NOT_KNOWN = Found(0, 0)
"""Of texts that come from no task or file."""


class Lines(NamedTuple):
    """The lines of a text file that are not empty, and phrases on how it was read."""

    texts: list[str]
    notes: tuple[str, ...]


def lines_of(path: Place) -> Lines:
    """Read a text file into memory: :func:`each_line`."""
    notes = list[str]()
    return Lines(list(each_line(path, notes)), tuple(notes))


def _unsaid(_share: float) -> None:
    pass


def each_line(
    path: Place, notes: list[str], say: Callable[[float], None] = _unsaid
) -> Iterator[str]:
    """Yield the lines of a text file that are not blank, without the blanks around them.

    Args:
        path: of the file: UTF-8, or as its byte order mark says; compressed as its ending says.
        notes: where phrases on how it was read go.
        say: is told now and then how much of the file is read, from 0 to 1.

    Raises:
        InputError: it cannot be read, is not UTF-8 or holds no text.
    """
    is_empty = True
    with opened(path) as file, explained("read", path):
        size = file_size(file)
        pieces = decompressed(file, size, path, BUILT_IN)
        text = decode(pieces, path, BUILT_IN)
        for block in blocks_of(text.pieces, path):
            if undecoded(block.text):
                raise _not_utf8(block, path)
            for line in map(str.strip, block.text.splitlines()):
                if line:
                    is_empty = False
                    yield line
            say(min(1.0, file.tell() / max(1, size)))
        notes += text.notes
    if is_empty:
        raise InputError(f"no text in it, {path}; give a file with a sentence a line")


def _not_utf8(block: Block, path: Place) -> InputError:
    """Return the error of a block that is not UTF-8, of its first such line."""
    number, found = next(
        (number, found) for number, line in block.lines if (found := undecoded(line))
    )
    return InputError(f"not UTF-8: {found}, {path}:{number}; convert the file to UTF-8")


def evenly(texts: Sequence[T], count: int) -> list[T]:
    """Return ``count`` evenly spaced texts, or all if there are no more (0: all)."""
    if not 0 < count < len(texts):
        return list(texts)
    return [texts[place] for place in np.linspace(0, len(texts) - 1, count).astype(int)]


def split_sentences(text: str) -> list[str]:
    """Split a document behind full stops, question and exclamation marks."""
    return [sentence for sentence in _SENTENCE_END.split(text) if sentence]


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Indices]:
    """Return the tokens of each text, int64, without [CLS] and [SEP]."""
    return [tokens[1:-1] for tokens in framed(tokenizer, texts, _WHOLE)]


def framed(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[Indices]:
    """Return the tokens of each text, int64, as the tasks' sentences: ``[CLS] … [SEP]``."""
    encoded = tokenizer.encode(texts, max_length)
    bounds = zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True)
    return [encoded.tokens[start:end].astype(np.int64) for start, end in bounds]


def divided(pieces: Iterable[Indices], max_tokens: int) -> Iterator[Indices]:
    """Yield pieces, those of more than ``max_tokens`` in parts of so many."""
    for piece in pieces:
        for start in range(0, len(piece), max_tokens):
            yield piece[start : start + max_tokens]


def cut_off(pieces: Iterable[Indices], max_tokens: int) -> Iterator[Indices]:
    """Yield the first ``max_tokens`` of each piece."""
    for piece in pieces:
        yield piece[:max_tokens]


def joined(pieces: Iterable[Indices], count: int, max_tokens: int, short: int) -> Iterator[Indices]:
    """Join neighbouring pieces, up to ``count`` of them, while they fit into ``max_tokens``.

    A piece of more than ``short`` tokens is joined with none; one that is too long by itself is
    cut.
    """
    waiting: list[Indices] = []
    for piece in pieces:
        full = len(waiting) == count or sum(map(len, waiting)) + len(piece) > max_tokens
        if waiting and (full or max(len(piece), len(waiting[-1])) > short):
            yield np.concatenate(waiting)[:max_tokens]
            waiting = []
        waiting.append(piece)
    if waiting:
        yield np.concatenate(waiting)[:max_tokens]
