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
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..utils.errors import InputError
from .decode import not_utf8, undecoded
from .dialect import AUTO, Dialect
from .first_line import advice_on, has_columns, is_of_another_dialect, split_line
from .rows import BadRowError, Row, Rows, find_columns

_NO_QUOTES = 'quoting = "none" if no quote means anything'


class _Record(NamedTuple):
    """A row with all its fields, or the reason why it has none."""

    place: str
    fields: Sequence[str] | BadRowError


def delimited_rows(
    text: str,
    path: Path,
    columns: Sequence[str],
    dialect: Dialect,
    delimiter: str,
    optional: str = "",
) -> Rows:
    """Return the rows of a delimited file.

    Args:
        text: of the file (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: those to read; they may stand in any order and further ones are ignored.
        dialect: how the file is written.
        delimiter: what the layout has between fields, where the dialect says nothing.  A header
            that has the wanted columns between tabs, and not between commas, outweighs it.
        optional: a column that may be there and is not read.  A file without a header whose rows
            are too short for it is said to be so, since its delimiter may be another.

    Raises:
        InputError: a column is missing, or wanted and there twice.
    """
    text = text.rstrip("\r\n")
    first_line = text.partition("\n")[0].removesuffix("\r")
    notes: list[str] = []
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
    records = _records(text, path, delimiter, dialect, notes)
    place, names, records = (_named if dialect.header else _numbered)(records, path)
    places = find_columns(names, columns, place, holder=holder, advice=advice)
    if optional and not dialect.header and optional not in names:
        notes.append(f"rows of {_counted(len(names), 'field')}, without column {optional}")
    picked = (_picked(record, len(names), places, holder, delimiter, dialect) for record in records)
    return Rows(picked, notes)


def _named(records: Iterator[_Record], path: Path) -> tuple[str, Sequence[str], Iterator[_Record]]:
    """Return where the header stands, the names of the columns in it and the records below."""
    place, fields = next(records, _Record(f"{path}:1", []))
    if isinstance(fields, BadRowError):
        advice = fields.advice.replace("the row", "the header")
        raise InputError(f"header: {fields}, {place}; {advice}") from fields
    return place, [name.strip() for name in fields], records


def _numbered(
    records: Iterator[_Record], path: Path
) -> tuple[str, Sequence[str], Iterator[_Record]]:
    """Return where the first readable row is, the numbers of its fields and all the records."""
    seen = []
    for record in records:
        seen.append(record)
        if not isinstance(record.fields, BadRowError):
            names = [str(number) for number in range(1, len(record.fields) + 1)]
            return record.place, names, chain(seen, records)
    place, fields = seen[0] if seen else _Record(f"{path}:1", BadRowError("empty file", "no row"))
    assert isinstance(fields, BadRowError)
    raise InputError(f"no usable row: {fields}, {place}; {fields.advice}")


def _records(
    text: str, path: Path, delimiter: str, dialect: Dialect, notes: list[str]
) -> Iterator[_Record]:
    if delimiter == "\t" or dialect.quoting == "none":
        return _lines(text, path, delimiter, dialect)
    return _stream(text, path, delimiter, dialect, notes)


def _lines(text: str, path: Path, delimiter: str, dialect: Dialect) -> Iterator[_Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path}:{number}"
        try:
            yield _Record(place, _fields(line.removesuffix("\r"), delimiter, dialect))
        except BadRowError as bad:
            yield _Record(place, bad)


def _stream(
    text: str, path: Path, delimiter: str, dialect: Dialect, notes: list[str]
) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
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


def _picked(
    record: _Record,
    width: int,
    places: Sequence[int],
    holder: str,
    delimiter: str,
    dialect: Dialect,
) -> Row:
    """Return the wanted columns of a record."""
    place, fields = record
    if isinstance(fields, BadRowError):
        return Row(place, fields)
    if len(fields) != width:
        advice = "correct the row"
        if any(delimiter in field for field in fields):  # quotes held together what is no field
            advice = dialect.advice(_NO_QUOTES, advice)
        detail = f"{len(fields)}, {holder} has {width}"
        return Row(place, BadRowError("number of fields", detail, advice))
    return Row(place, [fields[at] for at in places])
