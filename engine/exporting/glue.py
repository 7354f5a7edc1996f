"""Write the answers to GLUE's test files as its server wants them (Wang et al. 2018).

A submission is a file for each test file, CoLA.tsv and so on, with the columns ``index`` and
``prediction``: a class as the training files spell it, or a number.
"""

from collections.abc import Sequence
from os.path import realpath
from pathlib import Path
from typing import NamedTuple

from ..data.origins import DataFile
from ..data.rows import lines_on
from ..data.table import OnBadRow, Table, bad_row_lines
from ..data.task_schema import TaskSchema
from ..runs.data_paths import origin, splits_of
from ..runs.predictor import Predictor, schema
from ..runs.run import Run
from ..utils.errors import InputError
from ..utils.files import whole_folder
from ..utils.quoting import table_cell

_BINARY = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")


class GlueFile(NamedTuple):
    """A file of a submission.

    Attributes:
        name: of the file.
        task: whose answers it has, as the recipe ``glue`` calls it.
        split: of that task.
        classes: that GLUE knows there; none where it wants numbers.
        may_lack: whether a download of GLUE may lack the split's file.
    """

    name: str
    task: str
    split: str
    classes: tuple[str, ...]
    may_lack: bool = False


GLUE_FILES = (
    GlueFile("CoLA.tsv", "cola", "test", _BINARY),
    GlueFile("SST-2.tsv", "sst2", "test", _BINARY),
    GlueFile("MRPC.tsv", "mrpc", "test", _BINARY),
    GlueFile("QQP.tsv", "qqp", "test", _BINARY),
    GlueFile("STS-B.tsv", "stsb", "test", ()),
    GlueFile("MNLI-m.tsv", "mnli", "test", _NLI),
    GlueFile("MNLI-mm.tsv", "mnli", "test_mismatched", _NLI),
    GlueFile("QNLI.tsv", "qnli", "test", _ENTAILMENT),
    GlueFile("RTE.tsv", "rte", "test", _ENTAILMENT),
    GlueFile("WNLI.tsv", "wnli", "test", _BINARY),
    GlueFile("AX.tsv", "mnli", "diagnostic", _NLI, may_lack=True),
)
"""The files of a submission."""


class Submission(NamedTuple):
    """What a run can submit.

    Attributes:
        tables: the examples of each file, their labels unread.
        lines: for the user: why files are left out, how others were read.
    """

    tables: dict[GlueFile, Table]
    lines: list[str]


def read_tests(run: Run, on_bad_row: OnBadRow) -> Submission:
    """Read the test files of the GLUE tasks that a run has.

    Args:
        run: trained by the recipe ``glue``, or one whose tasks are called as there.
        on_bad_row: ``error``, or ``blank`` for empty texts in place of an unusable row, since every
            row is owed an answer.

    Raises:
        InputError: the run has none of the tasks, a file cannot be read, or the classes of a task
            are others than GLUE's.
    """
    tables, lines = dict[GlueFile, Table](), list[str]()
    for file in GLUE_FILES:
        reason = _reason_to_leave_out(run, file)
        if reason:
            lines.append(f"without {file.name}: {reason}")
            continue
        form = schema(run, file.task, file.split)
        _check_classes(run, file, form)
        found = origin(run.recipe, file.task, file.split)
        tables[file] = found.table(form, labelled=False, on_bad_row=on_bad_row)
        lines += lines_on(found.name, tables[file].notes)
        bad, first = tables[file].bad_rows, tables[file].first_bad
        for line in bad_row_lines(bad, first, "rows answered as empty texts"):
            lines.append(f"{file.name}: {line}")
    if not tables:
        known = ", ".join(dict.fromkeys(file.task for file in GLUE_FILES))
        raise InputError(
            f"{run.folder}: has no test file of a GLUE task ({known}); train the recipe glue"
        )
    return Submission(tables, lines)


def write_submission(
    run: Run, tables: dict[GlueFile, Table], to: Path, device: str | None = None
) -> int:
    """Answer all examples and write the folder; it has its name when it is complete.

    Args:
        run: that the tables were read for.
        tables: the examples of each file.
        to: the folder, new or empty.
        device: ``cpu`` or ``cuda``; None for the GPU if there is one.

    Returns:
        The number of sentences that were cut to the length limit.

    Raises:
        InputError: the run has no usable checkpoint, what the model computes is not finite, or the
            folder cannot be written.
    """
    predictor, texts, truncated = Predictor(run, device=device), dict[str, str](), 0
    for file, table in tables.items():
        split, found = predictor.answer(file.task, table)
        form = schema(run, file.task)
        texts[file.name] = _text(table, [*map(form.spell_label, found.predictions.tolist())])
        truncated += split.truncated
    with whole_folder(Path(realpath(to))) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return truncated


def _reason_to_leave_out(run: Run, file: GlueFile) -> str:
    """Return why a run has no answers for a file; empty where it has some."""
    if file.task not in run.recipe.tasks:
        return f"the run has no task {file.task}"
    if file.split not in splits_of(run.recipe, file.task):
        return f"the recipe names no {file.split} split of {file.task}"
    found = origin(run.recipe, file.task, file.split)
    if file.may_lack and isinstance(found, DataFile) and found.is_missing:
        return f"{found.path} is not there"
    return ""


def _check_classes(run: Run, file: GlueFile, form: TaskSchema) -> None:
    """Refuse a task that does not answer as GLUE wants it.

    Raises:
        InputError: its answers are others.
    """
    own = form.classes or tuple(map(str, range(int(form.high) + 1)))
    if form.labels != "one" or set(own if form.whole else ()) != set(file.classes):
        wanted = f"the classes {', '.join(file.classes)}" if file.classes else "numbers"
        raise InputError(
            f"{run.folder}: GLUE wants {wanted} of {file.task}, which has others; train it as the "
            "recipe glue does"
        )


def _text(table: Table, predictions: Sequence[str]) -> str:
    """Return the content of a file; a row without an index has its number, as GLUE counts."""
    rows = [
        (identifier or str(number), prediction)
        for number, (identifier, prediction) in enumerate(zip(table.ids, predictions, strict=True))
    ]
    lines = ["\t".join(map(table_cell, row)) for row in (("index", "prediction"), *rows)]
    return "\n".join(lines) + "\n"
