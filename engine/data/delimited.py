"""Rows of delimiter-separated values, read by the rules of csv or without quoting.

Separated by tabs, or read without quoting, a row is one physical line.  Csv rules apply within it
(a field may stand in double quotes, a quote inside is doubled), but a quoted field never runs on to
the next line: one stray quote would silently swallow the rows up to the next one, and sentences
have no use for line breaks.  Comma-separated files come from other programs and may have such
fields.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..errors import InputError
from .decode import not_utf8, undecoded
from .dialect import AUTO, Dialect, Quoting
from .rows import BadRowError, Row, Rows, find_columns

_CANDIDATES = ("\t", ",", ";", "|")
"""Delimiters that are tried on a header which lacks a column."""


class _Record(NamedTuple):
    """A row with all its fields, or why it has none."""

    place: str
    fields: Sequence[str] | BadRowError


def delimited_rows(
    text: str, path: Path, columns: Sequence[str], dialect: Dialect, delimiter: str
) -> Rows:
    """Return the rows of a delimited file.

    Args:
        text: of the file (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: those to read; they may stand in any order and further ones are ignored.
        dialect: how the file is written.
        delimiter: what the layout has between fields, where the dialect says nothing.  A header
            that has the wanted columns between tabs, and not between commas, outweighs it.

    Raises:
        InputError: a column is missing, or wanted and there twice.
    """
    text = text.rstrip("\r\n")
    first_line = text.partition("\n")[0].removesuffix("\r")
    notes: tuple[str, ...] = ()
    if dialect.delimiter != AUTO:
        delimiter = dialect.delimiter
    elif (
        delimiter == ","
        and dialect.header
        and not _has(first_line, columns, dialect, ",")
        and _has(first_line, columns, dialect, "\t")
    ):
        delimiter, notes = "\t", ("separated by tabs, as its header is, not by commas",)

    records = _records(text, path, delimiter, dialect)
    place, names, records = (_named if dialect.header else _numbered)(records, path)
    holder = "the header" if dialect.header else "the first row"
    advice = _advice(first_line, columns, dialect, delimiter)
    places = find_columns(names, columns, place, holder=holder, advice=advice)
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


def _records(text: str, path: Path, delimiter: str, dialect: Dialect) -> Iterator[_Record]:
    by_line = delimiter == "\t" or dialect.quoting == "none"
    return (_lines if by_line else _stream)(text, path, delimiter, dialect)


def _lines(text: str, path: Path, delimiter: str, dialect: Dialect) -> Iterator[_Record]:
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path}:{number}"
        try:
            yield _Record(place, _fields(line.removesuffix("\r"), delimiter, dialect))
        except BadRowError as bad:
            yield _Record(place, bad)


def _stream(text: str, path: Path, delimiter: str, dialect: Dialect) -> Iterator[_Record]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            yield _Record(place, _checked(next(reader), dialect))
        except StopIteration:
            return
        except BadRowError as bad:
            yield _Record(place, bad)
        except csv.Error as error:
            # Where a quote is broken nobody knows where the next row begins.
            advice = dialect.advice('quoting = "none"', "correct the file")
            raise InputError(f"not CSV: {error}, {place}; {advice}") from error


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
        raise BadRowError("line too long", f"{len(line)} characters")
    try:
        return _split(line, delimiter, dialect.quoting)
    except csv.Error as error:
        detail = str(error)
        if detail == "unexpected end of data":
            detail = "a quoted field does not end on its line"
        advice = dialect.advice('quoting = "none"', "correct the row")
        raise BadRowError("broken quoting", detail, advice) from error


def _split(line: str, delimiter: str, quoting: Quoting) -> list[str]:
    if quoting == "none":
        return line.split(delimiter)
    return next(csv.reader([line], delimiter=delimiter, strict=True), [])


def _has(line: str, columns: Sequence[str], dialect: Dialect, delimiter: str) -> bool:
    """Return whether a first line has the wanted columns, if a delimiter is its own."""
    try:
        fields = _split(line, delimiter, dialect.quoting)
    except csv.Error:
        return False
    if not dialect.header:
        return len(fields) >= max(map(int, columns))
    return set(columns) <= {name.strip() for name in fields}


def _advice(line: str, columns: Sequence[str], dialect: Dialect, delimiter: str) -> str:
    """Return what to do about a first line that lacks a column."""
    otherwise = "give a file with that column"
    signs = dict.fromkeys(char for char in line if not (char.isalnum() or char in '"_\0'))
    for other in (*_CANDIDATES, *(signs if dialect.header else ())):
        if other != delimiter and _has(line, columns, dialect, other):
            if not dialect.table:
                return f"separate its columns by {_spelt(delimiter)}"
            return f"set {dialect.table}.delimiter = {_spelt(other)}"
    if not dialect.header:
        return otherwise
    if _has(line, columns, replace(dialect, quoting="csv"), delimiter):
        return dialect.advice('quoting = "csv"', otherwise)
    return dialect.advice("header = false if that is a row already", otherwise)


def _spelt(delimiter: str) -> str:
    return json.dumps(delimiter, ensure_ascii=False)


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
            advice = dialect.advice('quoting = "none"', advice)
        detail = f"{len(fields)}, {holder} has {width}"
        return Row(place, BadRowError("number of fields", detail, advice))
    return Row(place, [fields[at] for at in places])
