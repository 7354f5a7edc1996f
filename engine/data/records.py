"""Rows of records whose values have types: JSON and Parquet."""

import io
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..utils.errors import InputError
from ..utils.untrusted_io import parse_json
from .decode import not_utf8, undecoded
from .dialect import Dialect
from .rows import TWICE, BadRowError, Row, Rows, find_columns, typed_row

_ARRAY = re.compile(r"\s*\[")
_OPEN_OBJECT = re.compile(r"\s*\{\s*")


def json_rows(
    text: str,
    path: Path,
    columns: Sequence[str],
    dialect: Dialect,
    *,
    may_be_array: bool,
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Rows:
    """Return the rows of a JSON file: an object a line or, where that may be, one array of objects.

    Args:
        text: of the file (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: the keys to read; further ones are ignored.
        dialect: how the file is written.
        may_be_array: whether a file that begins with a bracket is one array.
        lists: the keys whose values may be lists.
        objects: the keys whose values are objects.

    Raises:
        InputError: an array is no JSON.
    """
    if may_be_array and _ARRAY.match(text):
        notes = ["one JSON array, not an object a line"]
        return Rows(_array_rows(text, path, columns, dialect, lists, objects), notes)
    return Rows(_line_rows(text.rstrip("\r\n"), path, columns, dialect, lists, objects), [])


def _array_rows(
    text: str,
    path: Path,
    columns: Sequence[str],
    dialect: Dialect,
    lists: Collection[str],
    objects: Collection[str],
) -> Iterator[Row]:
    for number, record in enumerate(parse_whole(text, path, dialect)):
        yield _object_row(record, columns, f"{path}, row {number}", lists=lists, objects=objects)


def parse_whole(text: str, path: Path, dialect: Dialect) -> Any:
    """Return what a file that is one JSON value says.

    Raises:
        InputError: it is none, or not UTF-8.
    """
    if found := undecoded(text):
        advice = not_utf8(dialect, "convert the file to UTF-8")
        raise InputError(f"not UTF-8: {found}, {path}; {advice}")
    try:
        return parse_json(text, unambiguous)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"not JSON: {reason}, {path}; correct the file") from error


def _line_rows(
    text: str,
    path: Path,
    columns: Sequence[str],
    dialect: Dialect,
    lists: Collection[str],
    objects: Collection[str],
) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"{path}:{number}"
        advice = "correct the row"
        if _ARRAY.match(line):
            advice = f"end the file's name in .json if it is one array, or {advice}"
        elif _OPEN_OBJECT.fullmatch(line):
            advice = f"write an object a line, or one array of objects as .json, or {advice}"
        if found := undecoded(line):
            yield Row(place, BadRowError("not UTF-8", found, not_utf8(dialect, advice)))
            continue
        try:
            record = parse_json(line, unambiguous)
        except ValueError as error:
            yield Row(place, BadRowError("not JSON", " ".join(str(error).split()), advice))
            continue
        yield _object_row(record, columns, place, advice, lists, objects)


def _object_row(
    record: object,
    columns: Sequence[str],
    place: str,
    advice: str = "correct the row",
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Row:
    if isinstance(record, dict):
        return typed_row(record, columns, place, lists, objects)
    return Row(place, BadRowError("not a JSON object", type(record).__name__, advice))


def unambiguous(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object; a key that stands twice has no value that a row could use."""
    record = dict(pairs)
    if len(record) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        record |= {key: TWICE for key, count in counts.items() if count > 1}
    return record


def parquet_rows(
    content: bytes,
    path: Path,
    columns: Sequence[str],
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Iterator[Row]:
    """Yield the rows of a Parquet file.

    Args:
        content: of the file.
        path: where it comes from, for error messages.
        columns: those to read; further ones are ignored.
        lists: those whose values may be lists.
        objects: those whose values are objects.

    Raises:
        InputError: it cannot be read, or a column is missing, or wanted and there twice.
    """
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
            yield typed_row(record, columns, f"{path}, row {number}", lists, objects)
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable Parquet file ({reason})") from error
