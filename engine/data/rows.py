"""Rows of a data file: the texts of the wanted columns, whatever the file's format."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import isfinite
from typing import Any, NamedTuple

from ..utils.errors import InputError
from ..utils.json_text import dump_json
from .blocks import Block

_HALF = re.compile(r"[\ud800-\udfff]")
"""Halves of characters, which JSON can spell and nothing can write down."""


TWICE = object()
"""Stands for the value of a key that a record has twice."""


class BadRowError(Exception):
    """A row that cannot be used: ``reason`` is counted, ``detail`` says which and why."""

    def __init__(self, reason: str, detail: str, advice: str = "correct the row") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.advice = advice

    def __reduce__(self) -> tuple[type["BadRowError"], tuple[str, str, str]]:
        """Return what another process makes it of."""
        return BadRowError, (self.reason, self.detail, self.advice)


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: in the file, for error messages.
        values: the texts of the wanted columns, or the reason why it has none.
    """

    place: str
    values: Sequence[str] | BadRowError


class Piece(NamedTuple):
    """A part of a file, whose rows are made of it by itself, in any process.

    Attributes:
        first_row: the number of its first row, from 0.
        num_rows: how many it has.
        content: what rows are made of.
        read: makes them.
    """

    first_row: int
    num_rows: int
    content: Any
    read: Callable[[Any], Iterable[Row]]

    @property
    def rows(self) -> Iterable[Row]:
        """The rows."""
        return self.read(self.content)


class Rows(NamedTuple):
    """The rows of a whole file.

    Attributes:
        pieces: in the order of the file; reading on may raise InputError.
        notes: phrases on how the file was read; complete once the pieces are there.
        share: returns how much of the file is read, from 0 to 1.
    """

    pieces: Iterable[Piece]
    notes: list[str]
    share: Callable[[], float] = float


_ROWS_OF_A_PIECE = 4096


def _same(rows: Iterable[Row]) -> Iterable[Row]:
    return rows


def as_pieces(
    items: Iterable[Any], read: Callable[[Any], Iterable[Row]] = _same
) -> Iterator[Piece]:
    """Yield rows, or what one row each is made of, in pieces of lists."""
    first, items = 0, iter(items)
    while several := list(islice(items, _ROWS_OF_A_PIECE)):
        yield Piece(first, len(several), several, read)
        first += len(several)


def block_pieces(
    blocks: Iterable[Block], read: Callable[[Block], Iterable[Row]]
) -> Iterator[Piece]:
    """Yield blocks of lines that are a row each."""
    first = 0
    for block in blocks:
        yield Piece(first, block.num_lines, block, read)
        first += block.num_lines


def typed_row(
    record: Mapping[str, object],
    columns: Sequence[str],
    place: str,
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Row:
    """Return the row of a record of typed values, each value as text.

    Args:
        record: the values by column.
        columns: the wanted ones.
        place: of the record, for error messages.
        lists: those whose values may be lists, which become JSON.
        objects: those whose values are objects or lists of them, which become JSON, too.
    """
    try:
        return Row(
            place,
            [
                _as_json(name, record) if name in objects else _as_text(name, record, name in lists)
                for name in columns
            ],
        )
    except BadRowError as bad:
        return Row(place, bad)


def find_columns(
    names: Sequence[str],
    wanted: Sequence[str],
    where: str,
    *,
    holder: str = "the header",
    advice: str = "give a file with that column",
) -> list[int]:
    """Return the numbers of the wanted columns.

    Args:
        names: of all columns; unwanted ones may occur twice.
        wanted: the columns to find.
        where: the place of the names, for error messages.
        holder: what has the names, for error messages.
        advice: what to do when a column is missing.

    Raises:
        InputError: a wanted column is missing, or occurs twice.
    """
    for name in wanted:
        if name not in names:
            found = ", ".join(repr(shorten(other)) for other in names[:8])
            raise InputError(
                f"no column {name!r} in {holder}, {where}; it has {found or 'none'}: {advice}"
            )
        if names.count(name) > 1:
            raise InputError(f"{holder} names a column twice: {name!r}, {where}; rename one")
    return [names.index(name) for name in wanted]


def lines_on(name: str, notes: Iterable[str]) -> tuple[str, ...]:
    """Return a line for each note on how a file was read."""
    return tuple(f"read {name} as {note}" for note in notes)


def shorten(text: str, limit: int = 40) -> str:
    """Cut a text to the length of a quotation in an error message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _as_json(column: str, record: Mapping[str, object]) -> str:
    value = _value(column, record)
    if not isinstance(value, dict | list):
        return _as_text(column, record, may_be_list=False)
    try:
        text = dump_json(value)
    except (TypeError, ValueError):  # a key that stands twice, dates of Parquet
        raise BadRowError("neither text nor number", f"in column {column!r}") from None
    if _has_half(value):
        raise BadRowError("not Unicode", f"half of a character in column {column!r}")
    return text


def _has_half(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_has_half, value.values()))
    if isinstance(value, list):
        return any(map(_has_half, value))
    return isinstance(value, str) and _HALF.search(value) is not None


def _value(column: str, record: Mapping[str, object]) -> object:
    if column not in record:
        found = ", ".join(repr(shorten(name)) for name in list(record)[:8])
        raise BadRowError("missing column", f"{column!r}; there is {found or 'none'}")
    value = record[column]
    if value is TWICE:
        raise BadRowError("column given twice", repr(column))
    return value


def _as_text(column: str, record: Mapping[str, object], may_be_list: bool) -> str:
    value = _value(column, record)
    if isinstance(value, str):
        if _HALF.search(value):
            raise BadRowError("not Unicode", f"half of a character in column {column!r}")
        return value
    if isinstance(value, list) and may_be_list:
        for item in value:
            if not _is_plain(item):
                where = f"{_named(item)} in a list, column {column!r}"
                raise BadRowError("neither text nor number", where)
        text = dump_json(value)
        if _HALF.search("".join(item for item in value if isinstance(item, str))):
            raise BadRowError("not Unicode", f"half of a character in column {column!r}")
        return text
    if isinstance(value, bool):
        return str(value).lower()  # as JSON spells it
    if _is_plain(value):
        return repr(value)
    raise BadRowError("neither text nor number", f"{_named(value)} in column {column!r}")


def _is_plain(value: object) -> bool:
    """Return whether a value is text or a number; NaN, which stands for no value, is neither."""
    return isinstance(value, str | int) or (isinstance(value, float) and isfinite(value))


def _named(value: object) -> str:
    if value is None:
        return "no value"
    return repr(value) if isinstance(value, float) else type(value).__name__
