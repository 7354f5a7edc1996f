"""Rows of records whose values have types: JSON and Parquet."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from ..utils.errors import InputError, first_line
from ..utils.untrusted_io import parse_json
from .addresses import Address, Place
from .blocks import Block
from .decode import not_utf8, undecoded
from .dialect import Dialect
from .rows import (
    TWICE,
    BadRowError,
    Row,
    Rows,
    as_pieces,
    block_pieces,
    find_columns,
    typed_row,
)

_BUFFER, _BATCH = 1 << 20, 1024
"""Bytes of a column of a Parquet file that are read at a time, and rows that are made of them."""

_ARRAY = re.compile(r"\s*\[")
_OPEN_OBJECT = re.compile(r"\s*\{\s*")


def json_rows(
    blocks: Iterator[Block],
    path: Place,
    columns: Sequence[str],
    dialect: Dialect,
    *,
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Rows:
    """Return the rows of a file with a JSON object a line.

    Args:
        blocks: of the file's text (:class:`~.decode.Text`).
        path: where it comes from, for error messages.
        columns: the keys to read; further ones are ignored.
        dialect: how the file is written.
        lists: the keys whose values may be lists.
        objects: the keys whose values are objects.
    """
    read = _JsonLines(path, tuple(columns), dialect, frozenset(lists), frozenset(objects))
    return Rows(block_pieces(blocks, read), [])


def array_rows(
    text: str,
    path: Place,
    columns: Sequence[str],
    dialect: Dialect,
    *,
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Rows:
    """Return the rows of a file that is one JSON array of objects; arguments as above.

    It is one value, which is parsed as a whole, and so held in memory.

    Raises:
        InputError: it is no JSON.
    """
    records = enumerate(parse_whole(text, path, dialect))
    rows = (
        _object_row(record, columns, f"{path}, row {number}", lists=lists, objects=objects)
        for number, record in records
    )
    return Rows(as_pieces(rows), ["one JSON array, not an object a line"])


def is_array(text: str) -> bool:
    """Return whether a JSON file that begins so is one array."""
    return _ARRAY.match(text) is not None


def parse_whole(text: str, path: Place, dialect: Dialect) -> Any:
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


@dataclass(frozen=True, slots=True)
class _JsonLines:
    """The wanted keys of lines that are an object each."""

    path: Place
    columns: Sequence[str]
    dialect: Dialect
    lists: Collection[str]
    objects: Collection[str]

    def __call__(self, block: Block) -> Iterator[Row]:
        """Yield the rows of a block."""
        for number, line in block.lines:
            yield self._row(number, line)

    def _row(self, number: int, line: str) -> Row:
        place = f"{self.path}:{number}"
        advice = "correct the row"
        if _ARRAY.match(line):
            advice = f"end the file's name in .json if it is one array, or {advice}"
        elif _OPEN_OBJECT.fullmatch(line):
            advice = f"write an object a line, or one array of objects as .json, or {advice}"
        if found := undecoded(line):
            return Row(place, BadRowError("not UTF-8", found, not_utf8(self.dialect, advice)))
        try:
            record = parse_json(line, unambiguous)
        except ValueError as error:
            return Row(place, BadRowError("not JSON", " ".join(str(error).split()), advice))
        return _object_row(record, self.columns, place, advice, self.lists, self.objects)


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
    file: IO[bytes],
    path: Place,
    columns: Sequence[str],
    lists: Collection[str] = (),
    objects: Collection[str] = (),
) -> Rows:
    """Return the rows of a Parquet file.

    Args:
        file: its bytes, which can be read in any order.
        path: where it comes from, for error messages.
        columns: those to read; further ones are ignored.
        lists: those whose values may be lists.
        objects: those whose values are objects.
    """
    return Rows(as_pieces(_parquet_rows(file, path, columns, lists, objects)), [])


def _parquet_rows(
    file: IO[bytes],
    path: Place,
    columns: Sequence[str],
    lists: Collection[str],
    objects: Collection[str],
) -> Iterator[Row]:
    """Yield the rows.

    Raises:
        InputError: the file cannot be read, or a column is missing, or wanted and there twice.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"{path}: reading Parquet needs pyarrow (pip install pyarrow)") from None
    try:
        # Stores answer few large questions sooner: of them a row group is held in memory.
        is_far = isinstance(path, Address)
        opened = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=is_far)
        find_columns(opened.schema_arrow.names, columns, str(path))
        batches: Iterable[list[dict[str, object]]] = (
            batch.to_pylist() for batch in opened.iter_batches(_BATCH, columns=list(columns))
        )
        records = (record for batch in batches for record in batch)
        for number, record in enumerate(records):
            yield typed_row(record, columns, f"{path}, row {number}", lists, objects)
    # A date may be beyond those of Python; what is no text may say that it is.
    except (ArrowException, OSError, OverflowError, ValueError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({first_line(error)})") from error
