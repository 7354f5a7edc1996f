"""Read a tab-separated file of sentences and labels into a table, trusting nothing in it.

A row is one physical line.  Csv rules apply within it (a field may stand in double quotes, a quote
inside is doubled), but a quoted field never runs on to the next line: one stray quote would
silently swallow the rows up to the next one, and sentences have no use for line breaks.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from .formats import FileFormat

OnBadRow = Literal["error", "skip", "blank"]
"""What to do with a row that cannot be used.

``error``: raise InputError.  ``skip``: leave it out.  ``blank``: keep its place (and its id where
that can be read) with empty sentences, for predictions, which owe a line to every row.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file, in its order.

    Attributes:
        path: the file.
        ids: the ``id`` column.
        sentences: one list of strings for each sentence column.
        labels: float32 ``[n]``, or None where they were not asked for.
        bad_rows: how many rows were skipped or blanked, by reason.
        blank: the indices of the blanked rows.
    """

    path: Path
    ids: list[str]
    sentences: tuple[list[str], ...]
    labels: npt.NDArray[np.float32] | None
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    blank: tuple[int, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


def read_table(
    path: Path, format_: FileFormat, *, labelled: bool = True, on_bad_row: OnBadRow = "error"
) -> Table:
    """Read one file: :func:`parse_table` of its content."""
    return parse_table(read_bytes(path), path, format_, labelled=labelled, on_bad_row=on_bad_row)


def parse_table(
    content: bytes,
    path: Path,
    format_: FileFormat,
    *,
    labelled: bool = True,
    on_bad_row: OnBadRow = "error",
) -> Table:
    """Turn the content of one file into a table.

    Args:
        content: UTF-8 (a byte order mark is allowed) with a header line.  The columns may stand in
            any order and further ones are ignored.
        path: where it comes from, for error messages.
        format_: the columns to read and the range of the label.
        labelled: read the label column; without it, the file need not have one.
        on_bad_row: what to do with a row that cannot be used.

    Raises:
        InputError: the header lacks a column or names one twice, no row is usable, or, with
            ``on_bad_row="error"``, a row cannot be used.
    """
    lines = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").split(b"\n")
    columns = ("id", *format_.sentences, *((format_.label,) if labelled else ()))
    width, places = _read_header(path, lines[0], columns)

    ids: list[str] = []
    sentences: tuple[list[str], ...] = tuple([] for _ in format_.sentences)
    labels: list[float] = []
    bad_rows: Counter[str] = Counter()
    blank: list[int] = []
    for number, line in enumerate(lines[1:], start=2):
        identifier = ""
        try:
            fields = _split(line)
            if len(fields) != width:
                raise _BadRowError("number of fields", f"{len(fields)}, the header has {width}")
            identifier, *texts = (fields[place] for place in places)
            label = _check(identifier, texts, format_, labelled)
        except _BadRowError as bad:
            if on_bad_row == "error":
                raise InputError(
                    f"{bad.reason}: {bad.detail}, {path}:{number}; "
                    "correct the row or see --on-bad-row"
                ) from bad
            bad_rows[bad.reason] += 1
            if on_bad_row == "skip":
                continue
            blank.append(len(ids))
            texts, label = [""] * len(sentences), 0.0
        ids.append(identifier)
        for column, text in zip(sentences, texts, strict=False):
            column.append(text)
        labels.append(label)

    if len(ids) == len(blank):
        raise InputError(f"no usable row below the header, {path}:1; give a file that has some")
    return Table(
        path=path,
        ids=ids,
        sentences=sentences,
        labels=np.array(labels, dtype=np.float32) if labelled else None,
        bad_rows=dict(bad_rows),
        blank=tuple(blank),
    )


def read_bytes(path: Path) -> bytes:
    """Return the content of an input file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot read a file: {reason}, {path}; check the path") from error


class _BadRowError(Exception):
    """A row that cannot be used: ``reason`` is fit for counting, ``detail`` for finding."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def _read_header(path: Path, line: bytes, wanted: Sequence[str]) -> tuple[int, list[int]]:
    """Return the number of columns and the places of the wanted ones."""
    try:
        names = [name.strip() for name in _split(line)]
    except _BadRowError as bad:
        raise InputError(f"header: {bad}, {path}:1; correct the header") from bad
    twice = [name for name, count in Counter(names).items() if name and count > 1]
    if twice:
        raise InputError(f"header names a column twice: {twice[0]!r}, {path}:1; rename one")
    for name in wanted:
        if name not in names:
            found = ", ".join(repr(_shorten(other)) for other in names[:8])
            raise InputError(
                f"no column {name!r} in the header, {path}:1; it has {found}: "
                "give a tab-separated file with that column"
            )
    return len(names), [names.index(name) for name in wanted]


def _split(line: bytes) -> list[str]:
    """Decode a line and split it into its fields."""
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte 0x{line[error.start]:02x} at {error.start + 1}"
        raise _BadRowError("not UTF-8", where) from error
    if "\0" in text:
        raise _BadRowError("NUL character", f"at {text.index(chr(0)) + 1}")
    if "\r" in text:
        raise _BadRowError("carriage return", "within a line; lines end in LF or CR LF")
    if not text.strip():
        raise _BadRowError("empty line", "nothing in it")
    if len(text) > csv.field_size_limit():
        raise _BadRowError("line too long", f"{len(text)} characters")
    try:
        return next(csv.reader([text], delimiter="\t", strict=True))
    except csv.Error as error:
        detail = str(error)
        if detail == "unexpected end of data":
            detail = "a quoted field does not end on its line"
        raise _BadRowError("broken quoting", detail) from error


def _check(identifier: str, texts: list[str], format_: FileFormat, labelled: bool) -> float:
    """Return the label (0 where none is asked for) of a row in which all is well."""
    if not identifier.strip():
        raise _BadRowError("empty id", "column 'id'")
    for name, text in zip(format_.sentences, texts, strict=False):
        if not text.strip():
            raise _BadRowError("empty sentence", f"column {name!r}")
    if not labelled:
        return 0.0
    try:
        return format_.parse_label(texts[-1])
    except ValueError as error:
        where = f"{_shorten(texts[-1])!r} in column {format_.label!r}"
        raise _BadRowError(str(error), where) from error


def _shorten(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
