"""Read sentences and labels of an untrusted file into a table."""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from ..utils.errors import InputError
from ..utils.memory import machine_memory
from ..utils.untrusted_io import file_size, open_file
from .addresses import Place
from .blocks import LONGEST_LINE, blocks_of, joined, with_text
from .conll import conll_rows
from .decode import decode
from .decompress import decompressed
from .delimited import delimited_rows
from .dialect import DELIMITERS, endings
from .records import array_rows, is_array, json_rows, parquet_rows
from .rows import BadRowError, Row, Rows, shorten
from .squad import Span, is_nested, squad_rows
from .task_schema import TaskSchema

T = TypeVar("T")

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
        labels: float32 ``[n]``; of several labels ``[n, L]``, 0 or 1; of tagged words the tag of
            each, ``[W]``; of retrieval ones; of spans 1 where there is an answer.  None where they
            were not asked for.
        bad_rows: how many rows were skipped or blanked, by reason.
        blank: the indices of the blanked rows.
        notes: what was found out about the file, a phrase each.
        words: of each text, where its words are tagged; ``sentences`` has them joined by blanks.
        answers: of each question its spans of the context; None of other tasks, or where they were
            not asked for.
        first_bad: what was wrong with the first row that was skipped or blanked.
    """

    ids: list[str]
    sentences: tuple[list[str], ...]
    labels: npt.NDArray[np.float32] | None
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    blank: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    words: list[list[str]] | None = None
    answers: list[list[Span]] | None = None
    first_bad: str = ""

    @property
    def strata(self) -> npt.NDArray[np.float32]:
        """A number for each row, equal for rows with equal labels; of tagged words 0."""
        assert self.labels is not None, "read with labels"
        return strata(self.labels, len(self))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.ids)


def read_table(
    path: Path, format_: TaskSchema, *, labelled: bool = True, on_bad_row: OnBadRow = "error"
) -> Table:
    """Read one file into memory: :func:`file_rows` and :func:`collect`."""
    with open_file(path) as file:
        rows = file_rows(file, path, format_, labelled=labelled)
        return collect(rows, str(path), format_, labelled=labelled, on_bad_row=on_bad_row)


def parse_table(
    content: bytes,
    path: Place,
    format_: TaskSchema,
    *,
    labelled: bool = True,
    on_bad_row: OnBadRow = "error",
) -> Table:
    """Turn the content of one file into a table: :func:`file_rows` and :func:`collect`."""
    rows = file_rows(io.BytesIO(content), path, format_, labelled=labelled)
    return collect(rows, str(path), format_, labelled=labelled, on_bad_row=on_bad_row)


def file_rows(file: IO[bytes], path: Place, format_: TaskSchema, *, labelled: bool = True) -> Rows:
    """Return the rows of a file, which is read as they are asked for.

    Args:
        file: its bytes.
        path: where they come from, for error messages.
        format_: how the file is written, and the columns to read.
        labelled: read the label column; without it, the file need not have one.

    Raises:
        InputError: the file as a whole cannot be read, or a column to read is missing or there
            twice; also while rows are read.
    """
    layout, dialect = format_.layout_of(path), format_.dialect
    columns, lists = format_.columns(labelled=labelled), format_.list_columns
    objects = format_.object_columns
    pieces = decompressed(file, file_size(file), path, dialect)
    if layout == "parquet":
        if dialect.compression != "none" and endings(path)[1]:  # its end is read first
            file = io.BytesIO(b"".join(pieces))
        return parquet_rows(file, path, columns, lists, objects)
    text, notes = decode(pieces, path, dialect)
    longest = machine_memory() if layout == "json" else LONGEST_LINE  # which may be one array
    found = with_text(blocks_of(text, path, longest=longest))
    if found is None:
        raise EmptyFileError(f"empty file, {path}; give one with rows")
    beginning, blocks = found
    if layout in DELIMITERS:
        optional = "" if labelled else format_.label
        between = DELIMITERS[layout]
        return delimited_rows(blocks, path, columns, dialect, between, optional, notes)
    if layout in ("conll", "conllu"):
        if format_.labels != "words":
            raise InputError(f"{path}: a column file, which has words with tags; give a table")
        rows = conll_rows(blocks, path, columns, dialect, universal=layout == "conllu")
    elif layout == "json" and format_.labels == "spans" and is_nested(beginning, columns):
        rows = squad_rows(joined(blocks), path, columns, dialect)
    elif layout == "json" and is_array(beginning):
        rows = array_rows(joined(blocks), path, columns, dialect, lists=lists, objects=objects)
    else:
        rows = json_rows(blocks, path, columns, dialect, lists=lists, objects=objects)
    notes += rows.notes
    return rows._replace(notes=notes)


def collect(
    rows: Rows,
    where: str,
    format_: TaskSchema,
    *,
    labelled: bool,
    on_bad_row: OnBadRow,
) -> Table:
    """Check all rows and make one table of them.

    Args:
        rows: the texts of ``format_.columns(labelled=labelled)``.
        where: what the rows come from, for error messages.
        format_: the range of the label.
        labelled: whether the label is among the columns.
        on_bad_row: what to do with a row that cannot be used.

    Raises:
        InputError: no row is usable, or, with ``on_bad_row="error"``, a row cannot be used.
    """
    reader = TableReader(rows, where, format_, labelled=labelled, on_bad_row=on_bad_row)
    return reader.table()


class EmptyFileError(InputError):
    """A file has nothing in it, not even a header."""


class TableReader:
    """The rows of a file as tables, one for each piece, which are checked as they are read.

    Args:
        rows: as for :func:`collect`, as are those below.
        where: likewise.
        format_: likewise.
        labelled: likewise.
        on_bad_row: likewise.
    """

    def __init__(
        self,
        rows: Rows,
        where: str,
        format_: TaskSchema,
        *,
        labelled: bool,
        on_bad_row: OnBadRow,
    ) -> None:
        self._rows, self._where, self._format = rows, where, format_
        self._labelled, self._on_bad_row = labelled, on_bad_row

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found out about the file, a phrase each; complete once it is read."""
        return tuple(self._rows.notes)

    @property
    def share(self) -> float:
        """How much of the file is read, from 0 to 1."""
        return self._rows.share()

    def __iter__(self) -> Iterator[Table]:
        """Yield the tables.

        Raises:
            InputError: no row is usable, or, with ``on_bad_row="error"``, a row cannot be used.
        """
        usable, bad_rows, first_bad = 0, Counter[str](), ""
        for piece in self._rows.pieces:
            table = table_of(
                piece.rows,
                piece.first_row,
                self._format,
                labelled=self._labelled,
                on_bad_row=self._on_bad_row,
            )
            usable += len(table) - len(table.blank)
            bad_rows.update(table.bad_rows)
            first_bad = first_bad or table.first_bad
            yield table
        check_usable(usable, self._where, bad_rows, first_bad)

    def table(self) -> Table:
        """Return all rows as one table."""
        return _joined(list(self), self.notes)


def table_of(
    rows: Iterable[Row],
    first_row: int,
    format_: TaskSchema,
    *,
    labelled: bool,
    on_bad_row: OnBadRow,
) -> Table:
    """Check the rows of a piece, and make a table of them, which may be empty.

    Args:
        rows: as for :func:`collect`.
        first_row: the number of the first.
        format_: likewise, as are those below.
        labelled: likewise.
        on_bad_row: likewise.

    Raises:
        InputError: with ``on_bad_row="error"``, a row cannot be used.
    """
    ids: list[str] = []
    sentences: tuple[list[str], ...] = tuple([] for _ in format_.sentences)
    words: list[list[str]] = []
    labels: list[list[float]] = []
    answers: list[list[Span]] = []
    bad_rows: Counter[str] = Counter()
    blank: list[int] = []
    first_bad = ""
    for number, (place, values) in enumerate(rows, start=first_row):
        identifier = "" if format_.id else str(number)
        try:
            if isinstance(values, BadRowError):
                raise values
            texts = values
            if format_.id:
                identifier, *texts = values
            own_words, label = _check(identifier, texts, format_, labelled)
            spans = _spans(texts, format_) if labelled and format_.labels == "spans" else []
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
            texts, own_words, label, spans = [""] * len(sentences), [], [], []
        ids.append(identifier)
        for column, text in zip(sentences, texts, strict=False):
            column.append(" ".join(own_words) or text)
        words.append(own_words)
        labels.append([float(bool(spans))] if format_.labels == "spans" else label)
        answers.append(spans)
    return Table(
        ids=ids,
        sentences=sentences,
        labels=_array(labels, format_) if labelled else None,
        bad_rows=dict(bad_rows),
        blank=tuple(blank),
        words=words if format_.labels == "words" else None,
        answers=answers if labelled and format_.labels == "spans" else None,
        first_bad=first_bad,
    )


def bad_row_lines(
    bad_rows: Mapping[str, int], first_bad: str, what: str = "rows skipped"
) -> Iterator[str]:
    """Yield a line for each reason why rows were skipped or blanked, with the place of the first.

    Args:
        bad_rows: how many were, by reason.
        first_bad: what was wrong with the first of all, as of :class:`Table`.
        what: was done to them.
    """
    for reason, count in bad_rows.items():
        has_first = first_bad.startswith(f"{reason}: ")
        first = f"; the first: {first_bad.removeprefix(f'{reason}: ')}" if has_first else ""
        yield f"{count} {what} ({reason}){first}"


def check_usable(usable: int, where: str, bad_rows: Mapping[str, int], first_bad: str) -> None:
    """Refuse a file without a usable row.

    Args:
        usable: how many it has.
        where: what the rows come from.
        bad_rows: how many were skipped or blanked, by reason.
        first_bad: what was wrong with the first of these.

    Raises:
        InputError: it has none.
    """
    if usable:
        return
    if not first_bad:
        raise InputError(f"no usable row, {where}; give a file that has some")
    counts = ", ".join(f"{reason}: {count}" for reason, count in bad_rows.items())
    raise InputError(f"no usable row ({counts}), {where}; the first: {first_bad}")


def _joined(tables: Sequence[Table], notes: tuple[str, ...]) -> Table:
    """Return one table of those of all pieces."""
    starts = accumulate(map(len, tables), initial=0)
    blank = [
        row + start for table, start in zip(tables, starts, strict=False) for row in table.blank
    ]

    def all_of(lists: Iterable[Sequence[T] | None]) -> list[T] | None:
        found = [each for each in lists if each is not None]
        return list(chain.from_iterable(found)) if found else None

    columns = zip(*(table.sentences for table in tables), strict=True)
    labels = [table.labels for table in tables if table.labels is not None]
    return Table(
        ids=[identifier for table in tables for identifier in table.ids],
        sentences=tuple(list(chain.from_iterable(parts)) for parts in columns),
        labels=np.concatenate(labels) if labels else None,
        bad_rows=dict(sum((Counter(table.bad_rows) for table in tables), Counter[str]())),
        blank=tuple(blank),
        notes=notes,
        words=all_of(table.words for table in tables),
        answers=all_of(table.answers for table in tables),
        first_bad=next((table.first_bad for table in tables if table.first_bad), ""),
    )


def strata(labels: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.float32]:
    """Return a number for each of ``count`` examples, equal where labels are.

    Args:
        labels: ``[count]``, ``[count, L]``, or of tagged words ``[W]``, whose examples count alike.
        count: of examples.
    """
    if labels.ndim == 1:
        return labels if len(labels) == count else np.zeros(count, dtype=np.float32)
    _, found = np.unique(labels, axis=0, return_inverse=True)
    return found.reshape(-1).astype(np.float32)


def _array(labels: Sequence[Sequence[float]], format_: TaskSchema) -> npt.NDArray[np.float32]:
    """Return the labels of all rows as :class:`Table` has them."""
    if format_.labels == "several":
        width = int(format_.high) + 1
        rows = [row or [0.0] * width for row in labels]
        return np.array(rows, dtype=np.float32).reshape(-1, width)
    if format_.labels in ("one", "spans", "none"):
        return np.array([row[0] if row else 0.0 for row in labels], dtype=np.float32)
    return np.array(list(chain.from_iterable(labels)), dtype=np.float32)


def _check(
    identifier: str, texts: Sequence[str], format_: TaskSchema, labelled: bool
) -> tuple[list[str], list[float]]:
    """Return the words, where they are tagged, and the labels of a row in which all is well."""
    if not identifier.strip():
        raise BadRowError("empty id", f"column {format_.id!r}")
    for name, text in zip(format_.sentences, texts, strict=False):
        if not text.strip():
            raise BadRowError("empty sentence", f"column {name!r}")
    words: list[str] = []
    if format_.labels == "words":
        try:
            words = format_.words(texts[0])
        except ValueError as error:
            reason, _, detail = str(error).partition(": ")
            where = f"column {format_.sentences[0]!r}"
            raise BadRowError(reason, f"{detail}, {where}" if detail else where) from error
    if not labelled or format_.labels == "spans":
        return words, []
    cells = texts[len(format_.sentences) :]
    try:
        return words, format_.parse_labels(cells, len(words))
    except ValueError as error:
        reason, _, detail = str(error).partition(": ")
        raise BadRowError(reason, _label_place(format_, cells, detail)) from error


def _spans(texts: Sequence[str], format_: TaskSchema) -> list[Span]:
    """Return the answers of a row, as spans of its context."""
    _, context, cell = texts
    try:
        return format_.parse_spans(cell, context)
    except ValueError as error:
        reason, _, detail = str(error).partition(": ")
        raise BadRowError(reason, f"{detail}, column {format_.label!r}") from error


def _label_place(format_: TaskSchema, cells: Sequence[str], detail: str) -> str:
    """Return what is wrong with the label of a row, and where that is."""
    if format_.label_columns:
        named = zip(cells, format_.label_columns, strict=True)
        return ", ".join(f"{shorten(cell)!r} in column {name!r}" for cell, name in named)
    if format_.labels == "one":
        return f"{shorten(cells[0])!r} in column {format_.label!r}"
    return f"{detail or shorten(cells[0])}, column {format_.label!r}"
