"""Rows of column files: a word a line, an empty line between texts (CoNLL-2003, CoNLL-U).

Columns are called 1, 2, … from the left; a row has the words of a text, or what another column says
of each of them, as a JSON list.  ``-DOCSTART-`` lines are left out, and of CoNLL-U comments, ranges
of several words and words that are not in the text (numbers such as 1-2 and 1.1).
"""

from collections.abc import Iterator, Sequence
from itertools import chain

from ..utils.errors import InputError
from ..utils.json_text import dump_json
from .addresses import Place
from .blocks import Block
from .decode import not_utf8, undecoded
from .dialect import AUTO, Dialect
from .rows import BadRowError, Row, Rows, as_pieces

_DOCUMENT = "-DOCSTART-"


def conll_rows(
    blocks: Iterator[Block],
    path: Place,
    columns: Sequence[str],
    dialect: Dialect,
    *,
    universal: bool,
) -> Rows:
    """Return the rows of a column file.

    Args:
        blocks: of the file's text (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: their numbers, or -1 for the last one.
        dialect: how the file is written; by default the fields of a line are separated by blanks
            or tabs, those of CoNLL-U by tabs.
        universal: whether it is CoNLL-U.

    Raises:
        InputError: a column has no number.
    """
    places = []
    for name in columns:
        if name != "-1" and not (name.isascii() and name.isdigit() and int(name)):
            raise InputError(
                f"no column {name!r}, {path}; columns of this file are called 1, 2, … "
                "or -1, the last"
            )
        places.append(int(name) if name == "-1" else int(name) - 1)
    rows = _texts(blocks, path, places, dialect, universal)
    return Rows(as_pieces(rows), [])


def _texts(
    blocks: Iterator[Block], path: Place, places: Sequence[int], dialect: Dialect, universal: bool
) -> Iterator[Row]:
    separator = "\t" if universal else None
    if dialect.delimiter not in (AUTO, " "):
        separator = dialect.delimiter
    words: list[list[str]] = []
    first, bad = 0, None
    lines = chain.from_iterable(block.lines for block in blocks)
    for number, line in chain(lines, [(0, "")]):  # a text ends at an empty line
        if line.strip() and not line.startswith(_DOCUMENT):
            if universal and line.startswith("#"):
                continue
            first = first or number
            fields = _fields(line, separator)
            if universal and not fields[0].isdecimal():
                continue
            try:
                words.append(_picked(line, fields, places, dialect))
            except BadRowError as error:
                bad = bad or (number, error)
            continue
        if bad is not None:
            yield Row(f"{path}:{bad[0]}", bad[1])
        elif words:
            yield Row(
                f"{path}:{first}", [dump_json(list(each)) for each in zip(*words, strict=True)]
            )
        words, first, bad = [], 0, None


def _fields(line: str, separator: str | None) -> list[str]:
    """Return the fields of a line; None separates by blanks and tabs.

    Other blanks, such as those that keep 10 000 on one line, are characters of words.
    """
    if separator is not None:
        return line.split(separator)
    return [field for field in line.replace("\t", " ").split(" ") if field]


def _picked(line: str, fields: Sequence[str], places: Sequence[int], dialect: Dialect) -> list[str]:
    if found := undecoded(line):
        raise BadRowError("not UTF-8", found, not_utf8(dialect, "correct the line"))
    if "\0" in line:
        raise BadRowError("NUL character", f"at {line.index(chr(0)) + 1}", "correct the line")
    most = max(places)
    if len(fields) <= most:
        raise BadRowError(
            "number of fields", f"{len(fields)}, expected {most + 1} or more", "correct the line"
        )
    return [fields[place] for place in places]
