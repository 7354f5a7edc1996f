"""Files as rows of text: the wanted columns of tab- or comma-separated values, JSON lines, Parquet.

In a tab-separated file a row is one physical line.  Csv rules apply within it (a field may stand in
double quotes, a quote inside is doubled), but a quoted field never runs on to the next line: one
stray quote would silently swallow the rows up to the next one, and sentences have no use for line
breaks.  Comma-separated files come from other programs and may have such fields.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from ..errors import InputError
from ..reading import parse_json

Layout = Literal["tabs", "commas", "json", "parquet"]

LAYOUTS: Mapping[str, Layout] = {
    ".tsv": "tabs",
    ".csv": "commas",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
}
"""How a file is laid out, by its ending."""


_HALF = re.compile(r"[\ud800-\udfff]")
"""Halves of characters, which JSON can spell and nothing can write down."""


class BadRowError(Exception):
    """A row that cannot be used: ``reason`` is fit for counting, ``detail`` for finding."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Row(NamedTuple):
    """A row of a file.

    Attributes:
        place: where it stands, for error messages.
        values: the texts of the wanted columns, or why it has none.
    """

    place: str
    values: Sequence[str] | BadRowError


def rows_of(content: bytes, path: Path, layout: Layout, columns: Sequence[str]) -> Iterator[Row]:
    """Yield the rows of a file.

    Args:
        content: of the file; text is UTF-8, a byte order mark is allowed.
        path: where it comes from, for error messages.
        layout: how it is laid out; JSON is an object a line.
        columns: those to read; they may stand in any order and further ones are ignored.

    Raises:
        InputError: the file as a whole cannot be read, lacks a column or names one twice.
    """
    if layout == "parquet":
        yield from _parquet_rows(content, path, columns)
        return
    text = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")
    reader = {"tabs": _tab_rows, "commas": _comma_rows, "json": _json_rows}[layout]
    yield from reader(text, path, columns)


def typed_row(record: Mapping[str, object], columns: Sequence[str], place: str) -> Row:
    """Return the row of a record whose values have types: each as the text that spells it."""
    try:
        return Row(place, [_as_text(name, record.get(name)) for name in columns])
    except BadRowError as bad:
        return Row(place, bad)


def find_columns(names: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """Return the places of the wanted columns.

    Raises:
        InputError: one is missing, or a name stands twice.
    """
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise InputError(f"header names a column twice: {twice[0]!r}, {where}; rename one")
    for name in wanted:
        if name not in names:
            found = ", ".join(repr(shorten(other)) for other in names[:8])
            raise InputError(
                f"no column {name!r} in the header, {where}; it has {found}: "
                "give a file with that column"
            )
    return [names.index(name) for name in wanted]


def shorten(text: str, limit: int = 40) -> str:
    """Return a text that fits into an error message."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _tab_rows(content: bytes, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    lines = content.split(b"\n")
    try:
        names = [name.strip() for name in _split(lines[0])]
    except BadRowError as bad:
        raise InputError(f"header: {bad}, {path}:1; correct the header") from bad
    places = find_columns(names, columns, f"{path}:1")
    for number, line in enumerate(lines[1:], start=2):
        try:
            yield _picked(_split(line), len(names), places, f"{path}:{number}")
        except BadRowError as bad:
            yield Row(f"{path}:{number}", bad)


def _comma_rows(content: bytes, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"not UTF-8, {path}:{number}; convert the file to UTF-8") from error
    lines = _csv_fields(text, path)
    place, header = next(lines, (f"{path}:1", []))
    names = [name.strip() for name in header]
    places = find_columns(names, columns, place)
    for place, fields in lines:
        yield _picked(fields, len(names), places, place)


def _csv_fields(text: str, path: Path) -> Iterator[tuple[str, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        place = f"{path}:{reader.line_num + 1}"
        try:
            yield place, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # Where a quote is broken nobody knows where the next row begins.
            raise InputError(f"not CSV: {error}, {place}; correct the file") from error


def _json_rows(content: bytes, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(content.split(b"\n"), start=1):
        place = f"{path}:{number}"
        try:
            record = parse_json(line)
        except ValueError as error:  # a UnicodeDecodeError is one, too
            yield Row(place, BadRowError("not JSON", " ".join(str(error).split())))
            continue
        if not isinstance(record, dict):
            yield Row(place, BadRowError("not a JSON object", type(record).__name__))
            continue
        yield typed_row(record, columns, place)


def _parquet_rows(content: bytes, path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        find_columns(file.schema_arrow.names, columns, str(path))
        batches: Iterable[list[dict[str, object]]] = (
            batch.to_pylist() for batch in file.iter_batches(columns=list(columns))
        )
        records = (record for batch in batches for record in batch)
        for number, record in enumerate(records):
            yield typed_row(record, columns, f"{path}, row {number}")
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable Parquet file ({reason})") from error


def _picked(fields: Sequence[str], width: int, places: Sequence[int], place: str) -> Row:
    if len(fields) != width:
        bad = BadRowError("number of fields", f"{len(fields)}, the header has {width}")
        return Row(place, bad)
    return Row(place, [fields[at] for at in places])


def _as_text(column: str, value: object) -> str:
    if isinstance(value, str):
        if _HALF.search(value):
            raise BadRowError("not Unicode", f"half of a character in column {column!r}")
        return value
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return repr(value)
    what = "no value" if value is None else type(value).__name__
    raise BadRowError("neither text nor number", f"{what} in column {column!r}")


def _split(line: bytes) -> list[str]:
    """Decode a line and split it into its fields."""
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        raise BadRowError("not UTF-8", where) from error
    if "\0" in text:
        raise BadRowError("NUL character", f"at {text.index(chr(0)) + 1}")
    if "\r" in text:
        raise BadRowError("carriage return", "within a line; lines end in LF or CR LF")
    if not text.strip():
        raise BadRowError("empty line", "nothing in it")
    if len(text) > csv.field_size_limit():
        raise BadRowError("line too long", f"{len(text)} characters")
    try:
        return next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error as error:
        detail = str(error)
        if detail == "unexpected end of data":
            detail = "a quoted field does not end on its line"
        raise BadRowError("broken quoting", detail) from error
