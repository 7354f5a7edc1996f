"""Read rows of delimiter-separated values, by the rules of csv or without quoting.

Separated by tabs, or read without quoting, a row is one physical line.  Csv rules apply within it
(a field may be in double quotes, a quote inside is doubled), but a quoted field never runs on to
the next line: one stray quote would silently swallow the rows up to the next one, and sentences
have no use for line breaks.  Comma-separated files come from other programs and may have such
fields.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from ..utils.errors import InputError
from .addresses import Place
from .blocks import Block
from .decode import not_utf8, undecoded
from .dialect import AUTO, Dialect
from .first_line import advice_on, has_columns, is_of_another_dialect, split_line
from .rows import BadRowError, Piece, Row, Rows, as_pieces, block_pieces, find_columns

_NO_QUOTES = 'quoting = "none" if no quote means anything'


class _Record(NamedTuple):
    """A row with all its fields, or the reason why it has none."""

    place: str
    fields: Sequence[str] | BadRowError


@dataclass(frozen=True, slots=True)
class _Written:
    """How the rows of a file are written."""

    path: Place
    delimiter: str
    dialect: Dialect

    @property
    def is_lines(self) -> bool:
        """Whether a row is a line."""
        return self.delimiter == "\t" or self.dialect.quoting == "none"

    def lines(self, block: Block) -> Iterator[_Record]:
        """Yield the records of lines."""
        for number, line in block.lines:
            yield self.line(number, line)

    def line(self, number: int, line: str) -> _Record:
        """Return the record of a line."""
        place = f"{self.path}:{number}"
        try:
            return _Record(place, _fields(line, self.delimiter, self.dialect))
        except BadRowError as bad:
            return _Record(place, bad)


@dataclass(frozen=True, slots=True)
class _Columns:
    """The wanted columns of the records of a file; made of a block of lines, or of records."""

    written: _Written
    width: int
    places: Sequence[int]
    holder: str

    def __call__(self, content: Block | Sequence[_Record]) -> Iterator[Row]:
        """Yield rows."""
        records = self.written.lines(content) if isinstance(content, Block) else content
        for record in records:
            yield self._picked(record)

    def _picked(self, record: _Record) -> Row:
        place, fields = record
        if isinstance(fields, BadRowError):
            return Row(place, fields)
        if len(fields) != self.width:
            advice = "correct the row"
            # Quotes held together what is no field.
            if any(self.written.delimiter in field for field in fields):
                advice = self.written.dialect.advice(_NO_QUOTES, advice)
            detail = f"{len(fields)}, {self.holder} has {self.width}"
            return Row(place, BadRowError("number of fields", detail, advice))
        return Row(place, [fields[at] for at in self.places])


def delimited_rows(
    blocks: Iterator[Block],
    path: Place,
    columns: Sequence[str],
    dialect: Dialect,
    delimiter: str,
    optional: str,
    notes: list[str],
) -> Rows:
    """Return the rows of a delimited file.

    Args:
        blocks: of the file's text (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: those to read; they may stand in any order and further ones are ignored.
        dialect: how the file is written.
        delimiter: what the layout has between fields, where the dialect says nothing.  A header
            that has the wanted columns between tabs, and not between commas, outweighs it.
        optional: a column that may be there and is not read.  A file without a header whose rows
            are too short for it is said to be so, since its delimiter may be another.
        notes: where notes on how the file is read go.

    Raises:
        InputError: a column is missing, or wanted and there twice.
    """
    first = next(blocks)
    blocks = chain([first], blocks)
    _, first_line = next(first.lines)
    if dialect.delimiter != AUTO:
        delimiter = dialect.delimiter
    elif (
        delimiter == ","
        and dialect.header
        and not has_columns(first_line, columns, ",", dialect.quoting, header=True)
        and has_columns(first_line, columns, "\t", dialect.quoting, header=True)
    ):
        delimiter = "\t"
        notes.append("separated by tabs, as its header is, not by commas")

    holder = "the header" if dialect.header else "the first row"
    advice = advice_on(first_line, columns, dialect, delimiter)
    if is_of_another_dialect(first_line, columns, dialect, delimiter):
        find_columns([first_line], columns, f"{path}:1", holder=holder, advice=advice)
    written = _Written(path, delimiter, dialect)
    below = _blocks_below if written.is_lines else _records_below
    place, names, pieces = below(blocks, written, notes)
    places = find_columns(names, columns, place, holder=holder, advice=advice)
    if optional and not dialect.header and optional not in names:
        notes.append(f"rows of {_counted(len(names), 'field')}, without column {optional}")
    columns_of = _Columns(written, len(names), places, holder)
    return Rows((piece._replace(read=columns_of) for piece in pieces), notes)


def _blocks_below(
    blocks: Iterator[Block], written: _Written, _notes: list[str]
) -> tuple[str, Sequence[str], Iterator[Piece]]:
    """Return where the names of the columns stand, these, and the blocks below the header."""
    if written.dialect.header:
        first = next(blocks)
        place, names = _named(written.line(*next(first.lines)))
        rest = first.behind_first()
        return place, names, block_pieces(chain([] if rest is None else [rest], blocks), _unread)
    seen: list[Block] = []

    def records() -> Iterator[_Record]:
        for block in blocks:
            seen.append(block)
            yield from written.lines(block)

    place, names = _numbered(records())
    return place, names, block_pieces(chain(seen, blocks), _unread)


def _records_below(
    blocks: Iterator[Block], written: _Written, notes: list[str]
) -> tuple[str, Sequence[str], Iterator[Piece]]:
    """Return where the names of the columns stand, these, and the records below the header."""
    records = _stream(blocks, written, notes)
    if written.dialect.header:
        place, names = _named(next(records, _Record(f"{written.path}:1", [])))
        return place, names, as_pieces(records)
    seen: list[_Record] = []

    def noted() -> Iterator[_Record]:
        for record in records:
            seen.append(record)
            yield record

    place, names = _numbered(noted())
    return place, names, as_pieces(chain(seen, records))


def _unread(_content: object) -> Iterator[Row]:
    """Stand for what reads the columns, before these are known."""
    raise NotImplementedError


def _named(header: _Record) -> tuple[str, Sequence[str]]:
    """Return where a header stands, and the names of the columns in it."""
    place, fields = header
    if isinstance(fields, BadRowError):
        advice = fields.advice.replace("the row", "the header")
        raise InputError(f"header: {fields}, {place}; {advice}") from fields
    return place, [name.strip() for name in fields]


def _numbered(records: Iterator[_Record]) -> tuple[str, Sequence[str]]:
    """Return where the first readable row is, and the numbers of its fields."""
    first = None
    for record in records:
        if not isinstance(record.fields, BadRowError):
            return record.place, [str(number) for number in range(1, len(record.fields) + 1)]
        first = first or record
    assert first is not None, "a file that is not blank has a line"
    place, fields = first
    assert isinstance(fields, BadRowError)
    raise InputError(f"no usable row: {fields}, {place}; {fields.advice}")


def _physical_lines(blocks: Iterator[Block]) -> Iterator[str]:
    r"""Yield lines with their ends, which may be ``\r`` alone, for the csv reader."""
    held = None
    for block in blocks:
        if held is not None:
            yield from io.StringIO(held + "\n", newline="")
        held = block.text
    if held is not None:
        yield from io.StringIO(held, newline="")


def _stream(blocks: Iterator[Block], written: _Written, notes: list[str]) -> Iterator[_Record]:
    path, dialect = written.path, written.dialect
    reader = csv.reader(_physical_lines(blocks), delimiter=written.delimiter, strict=True)
    several, longest = 0, (0, 0)  # rows of several lines, which two stray quotes make, too
    while True:
        first = reader.line_num + 1
        place = f"{path}:{first}"
        try:
            fields = next(reader)
            if reader.line_num > first:
                several += 1
                longest = max(
                    longest, (first, reader.line_num), key=lambda lines: lines[1] - lines[0]
                )
            yield _Record(place, _checked(fields, dialect))
        except StopIteration:
            break
        except BadRowError as bad:
            yield _Record(place, bad)
        except csv.Error as error:
            # Where a quote is broken nobody knows where the next row begins.
            detail, otherwise = str(error), "correct the file"
            if detail.startswith("field larger"):
                detail = f"more than {csv.field_size_limit():,} characters in a field, or no quote"
                detail, otherwise = f"{detail} that ends it", "shorten the field"
            advice = dialect.advice(_NO_QUOTES, otherwise)
            raise InputError(f"not CSV: {detail}, {place}; {advice}") from error
    if several:
        begin, end = longest
        counted = _counted(several, "row")
        notes.append(f"CSV with {counted} of several lines, the longest on lines {begin} to {end}")


def _checked(fields: Sequence[str], dialect: Dialect) -> Sequence[str]:
    if not fields:
        raise BadRowError("empty line", "nothing in it")
    for number, field in enumerate(fields, start=1):
        if found := undecoded(field):
            advice = not_utf8(dialect, "correct the row")
            raise BadRowError("not UTF-8", f"{found} of field {number}", advice)
        if "\0" in field:
            raise BadRowError("NUL character", f"at {field.index(chr(0)) + 1} of field {number}")
    return fields


def _fields(line: str, delimiter: str, dialect: Dialect) -> list[str]:
    """Return the fields of a line."""
    if found := undecoded(line):
        raise BadRowError("not UTF-8", found, not_utf8(dialect, "correct the row"))
    if "\0" in line:
        raise BadRowError("NUL character", f"at {line.index(chr(0)) + 1}")
    if "\r" in line:
        raise BadRowError("carriage return", "within a line; lines end in LF or CR LF")
    if not line.strip():
        raise BadRowError("empty line", "nothing in it")
    if len(line) > csv.field_size_limit():
        limit = f"{len(line):,} characters, more than {csv.field_size_limit():,}"
        raise BadRowError("line too long", limit, "shorten it")
    try:
        return split_line(line, delimiter, dialect.quoting)
    except csv.Error as error:
        detail, otherwise = str(error), "correct the row"
        if detail == "unexpected end of data":
            detail = "a quoted field does not end on its line"
            otherwise = "bring the row onto one line"
        raise BadRowError(
            "broken quoting", detail, dialect.advice(_NO_QUOTES, otherwise)
        ) from error


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
