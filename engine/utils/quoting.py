"""Quote text of unknown origin for terminals, spreadsheets and Markdown."""

import json
import re
from typing import Any

from rich.console import Console

from .errors import escape

_FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "\uff1d",
    "\uff0b",
    "\uff0d",
    "\uff20",
)  # the last four: of full width
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
_MARKUP = re.compile(r"[\\`*\[\]|#>~$]|(?<![^\W_])_|_(?![^\W_])")
_BACKTICKS = re.compile("`+")
_ENTITY = re.compile(r"&(?=#?\w+;)")


def printable(text: str) -> str:
    """Spell out all control characters of a text, except line ends and tabs."""
    return escape(text, keep="\n\t")


def one_line(text: str) -> str:
    """Return text without line ends, and with all else that a terminal obeys spelt out."""
    return escape(" ".join(text.splitlines()))


def markdown_text(text: str) -> str:
    """Return text as Markdown shows it, in a sentence or a table's cell: no links, no HTML."""
    # A backslash before < is not understood everywhere.
    escaped = _ENTITY.sub("&amp;", one_line(text)).replace("<", "&lt;")
    return _MARKUP.sub(r"\\\g<0>", escaped)


def fence(text: str) -> str:
    """Return a line of backticks that none in the text ends."""
    longest = max(map(len, _BACKTICKS.findall(text)), default=0)
    return "`" * max(3, longest + 1)


def table_cell(text: str) -> str:
    """Return text as a cell that neither a spreadsheet evaluates nor a terminal obeys.

    Most texts are their own cell.  The cell of one that begins like a formula or with ``'``, or
    has control characters, is ``'`` and the text as in a JSON string; :func:`from_table_cell`
    reads both.
    """
    is_formula = text.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(text)
    if is_formula or text.startswith("'") or escape(text) != text:
        return "'" + escape(json.dumps(text, ensure_ascii=False)[1:-1], r"\u{:04x}")
    return text


def from_table_cell(cell: str) -> str:
    """Return the text that a cell of :func:`table_cell` stands for.

    Raises:
        ValueError: it stands for none.
    """
    return str(json.loads(f'"{cell[1:]}"')) if cell.startswith("'") else cell


class PlainConsole(Console):
    """A console that spells out the control characters of the texts that it prints."""

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as rich does."""
        super().print(
            *(printable(text) if isinstance(text, str) else text for text in objects), **settings
        )
