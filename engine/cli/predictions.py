"""Read the examples that ``engine.predict`` answers, and write its answers."""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from os.path import basename
from pathlib import Path
from typing import IO, Literal, NamedTuple

import numpy as np

from ..data.addresses import Place, opened
from ..data.dialect import ARCHIVES, AUTO, COMPRESSIONS, LAYOUTS, endings
from ..data.plain_text import text_rows
from ..data.rows import Rows, lines_on
from ..data.split import TokenizedSplit
from ..data.table import OnBadRow, Table, TableReader, file_rows
from ..data.task_schema import TaskSchema
from ..runs.data_paths import origin
from ..runs.predictor import Prediction, class_names, predictions
from ..runs.run import Run
from ..runs.scoring import Answers
from ..runs.search import Found
from ..utils.errors import InputError, escape
from ..utils.json_text import dump_json
from ..utils.quoting import table_cell
from ..utils.untrusted_io import file_size, is_blank, standard_input

STREAM = Path("-")
"""Stands for standard input or standard output."""

INPUT_FORMATS = (AUTO, "text", "tsv", "csv", "jsonl", "json", "parquet", "conll", "conllu")

OutputFormat = Literal["tsv", "jsonl"]
OUTPUT_FORMATS = (AUTO, "tsv", "jsonl")

_NOT_WRITTEN = {".json", ".parquet", ".conll", ".conllu", ".xlsx", *COMPRESSIONS}
_UNSEEN = "_"  # as of TaskSchema.spell_labels


class Examples(NamedTuple):
    """Examples to be answered, read as they are asked for.

    Attributes:
        tables: of them, one after the other.
        name: of what they come from.
    """

    tables: TableReader
    name: str

    @property
    def notes(self) -> tuple[str, ...]:
        """A line for each note on how they were read; complete once they are."""
        return lines_on(self.name, self.tables.notes)


@contextmanager
def read_examples(
    path: Place, format_: TaskSchema, written_as: str, on_bad_row: OnBadRow
) -> Iterator[Examples]:
    """Open examples of a task.

    Args:
        path: of the file, its address, or STREAM.
        format_: the task's schema.
        written_as: one of INPUT_FORMATS.
        on_bad_row: treatment of unusable rows.

    Raises:
        InputError: they cannot be read.
    """
    is_stream = path == STREAM
    with standard_input() if is_stream else opened(path) as file:
        path = Path("standard input") if is_stream else path
        rows, format_ = _rows_of(file, path, format_, written_as, is_stream=is_stream)
        size = max(1, file_size(file))
        rows = rows._replace(share=lambda: min(1.0, file.tell() / size))
        tables = TableReader(rows, str(path), format_, labelled=False, on_bad_row=on_bad_row)
        yield Examples(tables, basename(str(path)))


def _rows_of(
    file: IO[bytes], path: Place, format_: TaskSchema, written_as: str, *, is_stream: bool
) -> tuple[Rows, TaskSchema]:
    """Return the rows of an open file, and the schema by which they are to be checked."""
    if written_as == "text" or (is_stream and written_as == AUTO):
        rows = text_rows(file, path, format_, sure=written_as == "text")
        return rows, replace(format_, id="")  # rows are numbered
    if written_as != AUTO:
        format_ = replace(format_, layout=LAYOUTS[f".{written_as}"])
    elif (
        (format_.layout, format_.dialect.delimiter) == (None, AUTO)
        and not is_stream
        and endings(path)[0] not in (*LAYOUTS, *ARCHIVES)
    ):
        raise InputError(
            f"{path}: unknown ending; name its format by --input-format (text: a sentence a line)"
        )
    if is_stream and is_blank(file):
        raise InputError(f"empty, {path}; give rows")
    return file_rows(file, path, format_, labelled=False), format_


@contextmanager
def read_split(run: Run, form: TaskSchema, split: str, on_bad_row: OnBadRow) -> Iterator[Examples]:
    """Open a split of a task as the run's recipe describes it, labels or not.

    Args:
        run: the run.
        form: the schema of the split, of one of its tasks.
        split: that the task has.
        on_bad_row: treatment of unusable rows.

    Raises:
        InputError: they cannot be read.
    """
    found = origin(run.recipe, form.task, split)
    with found.rows(form, labelled=False) as rows:
        tables = TableReader(rows, found.where, form, labelled=False, on_bad_row=on_bad_row)
        yield Examples(tables, found.name)


def output_format(path: Path, named: str) -> OutputFormat:
    """Return the format of the answers: the one that is named, or as the file's ending says.

    Raises:
        InputError: no format is named, and the ending is that of one that is not written.
    """
    if named != AUTO:
        return "jsonl" if named == "jsonl" else "tsv"
    layout, compression = endings(path)
    for ending in (compression, layout):
        if ending in _NOT_WRITTEN:
            raise InputError(
                f"--output {path}: {ending} files are not written; end it in .tsv or .jsonl, or "
                "give --output-format"
            )
    return "jsonl" if layout == ".jsonl" else "tsv"


def as_tsv(
    form: TaskSchema,
    table: Table,
    split: TokenizedSplit,
    found: Answers,
    *,
    probabilities: bool,
    header: bool,
) -> str:
    """Return answers as rows of a table: id, prediction and, where asked for, probabilities.

    These are a column ``probability.CLASS`` for each class or label, or a column ``probability``
    with that of each word's tag, blanks between them.  ``header``: whether the names of the columns
    come first.
    """
    columns = ["id", "prediction"]
    if probabilities and form.labels == "words":
        columns.append("probability")
    elif probabilities and found.probabilities is not None:
        names = class_names(form, found.probabilities.shape[1])
        columns += [f"probability.{name}" for name in names]
    of_rows = np.split(found.predictions, found.offsets[1:-1])
    if form.labels == "spans":
        texts = [answer and answer.prediction for answer in predictions(form, table, split, found)]
        rows = [[name, str(text or "")] for name, text in zip(table.ids, texts, strict=True)]
    else:
        rows = [
            [identifier, form.spell_labels(values.ravel().tolist())]
            for identifier, values in zip(table.ids, of_rows, strict=True)
        ]
    if probabilities:
        for row, answer in zip(rows, predictions(form, table, split, found), strict=True):
            row += _share_cells(answer)
    for blank in table.blank:
        rows[blank][1:] = [""] * (len(columns) - 1)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    above = [columns] if header else []
    writer.writerows([table_cell(cell) for cell in row] for row in (*above, *rows))
    return text.getvalue()


def _share_cells(answer: Prediction | None) -> list[str]:
    shares = None if answer is None else answer.probabilities
    if isinstance(shares, dict):
        return [f"{share:.6f}" for share in shares.values()]
    return [" ".join(_UNSEEN if share is None else f"{share:.6f}" for share in shares or ())]


def as_json_lines(
    table: Table, answers: Sequence[Prediction | None], *, tagged: bool, probabilities: bool
) -> str:
    """Return answers as JSON lines, an object for each row.

    ``id`` is a text; ``prediction`` as :class:`Prediction` has it, null for a blanked row; where
    words are tagged they are the list ``words``; ``answer_start`` is the first character of an
    answer in its context; ``probabilities`` stand there where asked for.
    """
    lines = []
    for identifier, answer in zip(table.ids, answers, strict=True):
        record: dict[str, object] = {"id": identifier}
        if tagged:
            record["words"] = None if answer is None else answer.words
        record["prediction"] = None if answer is None else _short(answer.prediction)
        if answer is not None and answer.span is not None:
            record["answer_start"] = answer.span[0]
        if probabilities:
            record["probabilities"] = None if answer is None else _short(answer.probabilities)
        lines.append(escape(dump_json(record), r"\u{:04x}") + "\n")
    return "".join(lines)


def matches_as_tsv(anchors: Table, passages: Table, found: Found) -> str:
    """Return found passages as a table: id, rank, passage (its id) and similarity.

    A blanked anchor has one row, without a passage.
    """
    rows: list[list[str]] = []
    for anchor, own in _matches(anchors, passages, found):
        rows += [
            [anchor, str(rank), passage, f"{similarity:.4f}"]
            for rank, (passage, similarity) in enumerate(own, start=1)
        ] or [[anchor, "", "", ""]]
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    header = ["id", "rank", "passage", "similarity"]
    writer.writerows([table_cell(cell) for cell in row] for row in (header, *rows))
    return text.getvalue()


def matches_as_json_lines(anchors: Table, passages: Table, found: Found) -> str:
    """Return found passages as JSON lines, an object for each anchor.

    ``passages`` is a list of objects with ``id`` and ``similarity``, null for a blanked anchor.
    """
    lines = []
    for anchor, own in _matches(anchors, passages, found):
        listed = [{"id": passage, "similarity": _short(value)} for passage, value in own]
        record: dict[str, object] = {"id": anchor, "passages": listed or None}
        lines.append(escape(dump_json(record), r"\u{:04x}") + "\n")
    return "".join(lines)


def _matches(
    anchors: Table, passages: Table, found: Found
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """Yield the id of each anchor with the ids and similarities of its passages."""
    blank = set(anchors.blank)
    for number, anchor in enumerate(anchors.ids):
        numbers, values = found.passages[number].tolist(), found.similarities[number].tolist()
        own = [(passages.ids[place], value) for place, value in zip(numbers, values, strict=True)]
        yield anchor, [] if number in blank else own


def _short(value: object) -> object:
    """Return float32 values by the fewest digits that tell them apart."""
    if isinstance(value, float):
        return float(str(np.float32(value)))
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return [_short(item) for item in value] if isinstance(value, list) else value
