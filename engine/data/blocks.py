"""Blocks of whole lines: the pieces in which a text file is read."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from ..utils.errors import InputError
from .addresses import Place

BLOCK = 1 << 20
"""Characters of a block, or a line more."""

LONGEST_LINE = 64 << 20
"""Characters of a line, whatever is on it."""


class Block(NamedTuple):
    r"""Neighbouring lines of a file.

    Attributes:
        first_line: the number of the first, from 1.
        text: the lines, with ``\n`` between them.
    """

    first_line: int
    text: str

    @property
    def lines(self) -> Iterator[tuple[int, str]]:
        r"""The lines and their numbers, without the ``\r`` of a ``\r\n``."""
        for number, line in enumerate(self.text.split("\n"), start=self.first_line):
            yield number, line.removesuffix("\r")

    @property
    def num_lines(self) -> int:
        """How many lines it has."""
        return self.text.count("\n") + 1

    def behind_first(self) -> "Block | None":
        """Return the block without its first line; None where it has no other."""
        _, end, rest = self.text.partition("\n")
        return Block(self.first_line + 1, rest) if end else None


def blocks_of(
    pieces: Iterable[str], path: Place, *, size: int = BLOCK, longest: int = LONGEST_LINE
) -> Iterator[Block]:
    """Cut a text into blocks; line ends that nothing follows are left out.

    Args:
        pieces: of the text, which are cut anywhere.
        path: where it comes from, for error messages.
        size: characters from which on a block ends at the next end of a line.
        longest: the most characters of a line.

    Raises:
        InputError: a line is longer.
    """
    number, kept, looked_at = 1, "", 0
    for piece, text in _with_text_behind(pieces):
        kept += piece
        if len(kept) < size:
            continue
        # An end of a line that other text follows, in what was not looked at.
        followed = len(kept) - len(piece) + text
        end = kept.rfind("\n", looked_at, followed)
        if end < 0:
            looked_at = followed
            if looked_at > longest:
                raise InputError(
                    f"a line of more than {longest:,} characters, {path}:{number}; give a file "
                    "with a row a line"
                )
            continue
        block = Block(number, kept[:end])
        yield block
        number, kept, looked_at = number + block.num_lines, kept[end + 1 :], 0
    if (rest := kept.rstrip("\r\n")) or number == 1:
        yield Block(number, rest)


def _with_text_behind(pieces: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield pieces of a text up to the last that is more than line ends.

    With each comes where the line ends begin in it that no text may follow.  Those of a file that
    ends in many are waited with, not looked at again and again.
    """
    waiting: list[str] = []
    for piece in pieces:
        if text := len(piece.rstrip("\r\n")):
            yield from ((ends, len(ends)) for ends in waiting)
            yield piece, text
            waiting = []
        else:
            waiting.append(piece)


def with_text(blocks: Iterator[Block]) -> tuple[str, Iterator[Block]] | None:
    """Return how a text begins, up to the end of the first block that is not blank, and all blocks.

    None where all of it is blank.
    """
    kept: list[Block] = []
    for block in blocks:
        kept.append(block)
        if block.text.strip():
            return "\n".join(block.text for block in kept), chain(kept, blocks)
    return None


def joined(blocks: Iterable[Block]) -> str:
    """Return the text of all blocks."""
    return "\n".join(block.text for block in blocks)
