"""Read sentences and labels of an untrusted file into a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..utils.errors import InputError
from ..utils.untrusted_io import read_bytes
from .decode import decode
from .decompress import decompress
from .delimited import delimited_rows
from .dialect import DELIMITERS
from .records import json_rows, parquet_rows
from .rows import BadRowError, Rows, shorten
from .task_schema import TaskSchema

OnBadRow = Literal["error", "skip", "blank"]
"""Treatment of a row that cannot be used.

``error``: raise InputError.  ``skip``: leave it out.  ``blank``: keep its place (and its id where
that can be read) with empty sentences, for predictions, which owe a line to every row.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The rows of one file, in its order.

    Attributes:
        ids: the id column, or the rows' numbers where the format has none.
        sentences: one list of strings for each sentence column.
        labels: float32 ``[n]``, or None where they were not asked for.
        bad_rows: how many rows were skipped or blanked, by reason.
        blank: the indices of the blanked rows.
        notes: what was found out about the file, a phrase each.
    """

    ids: list[str]
    sentences: tuple[list[str], ...]
    labels: npt.NDArray[np.float32] | None
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    blank: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


def read_table(
    path: Path, format_: TaskSchema, *, labelled: bool = True, on_bad_row: OnBadRow = "error"
) -> Table:
    """Read one file: :func:`parse_table` of its content."""
    content = read_bytes(path, None)
    return parse_table(content, path, format_, labelled=labelled, on_bad_row=on_bad_row)


def parse_table(
    content: bytes,
    path: Path,
    format_: TaskSchema,
    *,
    labelled: bool = True,
    on_bad_row: OnBadRow = "error",
) -> Table:
    """Turn the content of one file into a table.

    Args:
        content: of the file.
        path: where it comes from, for error messages.
        format_: how the file is written, the columns to read and the range of the label.
        labelled: read the label column; without it, the file need not have one.
        on_bad_row: what to do with a row that cannot be used.

    Raises:
        InputError: the file as a whole cannot be read, a column to read is missing or there twice,
            no row is usable, or, with ``on_bad_row="error"``, a row cannot be used.
    """
    rows = _rows_of(content, path, format_, labelled=labelled)
    return collect(rows, str(path), format_, labelled=labelled, on_bad_row=on_bad_row)


def _rows_of(content: bytes, path: Path, format_: TaskSchema, *, labelled: bool) -> Rows:
    layout, dialect = format_.layout_of(path), format_.dialect
    columns = format_.columns(labelled=labelled)
    content = decompress(content, path, dialect)
    if layout == "parquet":
        return Rows(parquet_rows(content, path, columns), [])
    text, notes = decode(content, path, dialect)
    if not text.strip():
        raise InputError(f"empty file, {path}; give one with rows")
    if layout in DELIMITERS:
        optional = "" if labelled else format_.label
        rows = delimited_rows(text, path, columns, dialect, DELIMITERS[layout], optional)
    else:
        rows = json_rows(text, path, columns, dialect, may_be_array=layout == "json")
    rows.notes[:0] = notes
    return rows


def collect(
    rows: Rows,
    where: str,
    format_: TaskSchema,
    *,
    labelled: bool,
    on_bad_row: OnBadRow,
) -> Table:
    """Check rows and make a table of them; see :func:`parse_table`.

    Args:
        rows: the texts of ``format_.columns(labelled=labelled)``.
        where: what the rows come from, for error messages.
        format_: the range of the label.
        labelled: whether the label is among the columns.
        on_bad_row: what to do with a row that cannot be used.
    """
    ids: list[str] = []
    sentences: tuple[list[str], ...] = tuple([] for _ in format_.sentences)
    labels: list[float] = []
    bad_rows: Counter[str] = Counter()
    blank: list[int] = []
    first_bad = ""
    for number, (place, values) in enumerate(rows.rows):
        identifier = "" if format_.id else str(number)
        try:
            if isinstance(values, BadRowError):
                raise values
            texts = values
            if format_.id:
                identifier, *texts = values
            label = _check(identifier, texts, format_, labelled)
        except BadRowError as bad:
            if on_bad_row == "error":
                raise InputError(
                    f"{bad.reason}: {bad.detail}, {place}; {bad.advice} or see --on-bad-row"
                ) from bad
            bad_rows[bad.reason] += 1
            first_bad = first_bad or f"{bad}, {place}; {bad.advice}"
            if on_bad_row == "skip":
                continue
            blank.append(len(ids))
            texts, label = [""] * len(sentences), 0.0
        ids.append(identifier)
        for column, text in zip(sentences, texts, strict=False):
            column.append(text)
        labels.append(label)

    if len(ids) == len(blank):
        raise InputError(_no_usable_row(where, bad_rows, first_bad))
    return Table(
        ids=ids,
        sentences=sentences,
        labels=np.array(labels, dtype=np.float32) if labelled else None,
        bad_rows=dict(bad_rows),
        blank=tuple(blank),
        notes=tuple(rows.notes),
    )


def _no_usable_row(where: str, bad_rows: Counter[str], first_bad: str) -> str:
    if not first_bad:
        return f"no usable row, {where}; give a file that has some"
    counts = ", ".join(f"{reason}: {count}" for reason, count in bad_rows.items())
    return f"no usable row ({counts}), {where}; the first: {first_bad}"


def _check(identifier: str, texts: Sequence[str], format_: TaskSchema, labelled: bool) -> float:
    """Return the label (0 where none is asked for) of a row in which all is well."""
    if not identifier.strip():
        raise BadRowError("empty id", f"column {format_.id!r}")
    for name, text in zip(format_.sentences, texts, strict=False):
        if not text.strip():
            raise BadRowError("empty sentence", f"column {name!r}")
    if not labelled:
        return 0.0
    try:
        return format_.parse_label(texts[-1])
    except ValueError as error:
        where = f"{shorten(texts[-1])!r} in column {format_.label!r}"
        raise BadRowError(str(error), where) from error
