"""``python -m engine.predict RUN``: predict a file's rows with a run's best checkpoint.

In Python, :class:`Predictor` loads a run once and answers many times, and :class:`RequestBatcher`
packs the requests of many clients together.
"""

import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, NamedTuple

from .cli.common import Parser, ended_by_sigterm, one_file, positive, run_cli, terminal
from .cli.data_progress import shown_on
from .cli.options import add_device, add_force, add_run_data, with_run_data
from .cli.predictions import (
    INPUT_FORMATS,
    OUTPUT_FORMATS,
    STREAM,
    Examples,
    OutputFormat,
    as_json_lines,
    as_tsv,
    matches_as_json_lines,
    matches_as_tsv,
    output_format,
    read_examples,
    read_split,
)
from .data.cache import Reading
from .data.dialect import AUTO
from .data.hub_stream import HubStream
from .data.origins import HubSplit
from .data.table import OnBadRow, bad_row_lines
from .data.task_schema import TaskSchema
from .runs.data_paths import check_split, origin
from .runs.predictor import Match, Prediction, Predictor, has_probabilities, predictions, schema
from .runs.request_batcher import OverloadedError, RequestBatcher
from .runs.run import Run, open_run
from .runs.search import anchors_of, passages_of
from .utils.errors import InputError
from .utils.output_files import check_outputs, open_output

_TOP = 10

__all__ = ["Match", "OverloadedError", "Prediction", "Predictor", "RequestBatcher", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    _check_input(options)
    to_stdout = options.output == STREAM
    form_out = output_format(options.output, options.output_format)
    run = with_run_data(open_run(options.run), options.data)
    try:
        form = schema(run, options.task, options.split or "")
    except InputError as error:
        raise InputError(f"--{error}") from None
    output = Path("/dev/stdout") if to_stdout else options.output
    replace = check_outputs([output], force=options.force, inputs=_files_read(options, run))
    if options.passages is None and options.top is not None:
        raise InputError(f"--top {options.top}: has no effect without --passages; leave it out")
    if options.passages is not None and form.labels != "none":
        raise InputError(
            f"--passages: {options.task} finds none, its kind is {form.kind}; leave it out"
        )
    if options.probabilities and not has_probabilities(form):
        raise InputError(
            f"--probabilities: {options.task} has none, its head ({form.kind}) answers without; "
            "leave it out"
        )
    # Every row is owed a line, so a skipped one keeps its place as a blank.
    on_bad_row: OnBadRow = "blank" if options.on_bad_row == "skip" else "error"
    made = _found if options.passages is not None else _answered
    with (
        ended_by_sigterm(),
        nullcontext(_Printer()) if to_stdout else open_output(output, replace=replace) as file,
    ):
        done = made(run, options, form, form_out, on_bad_row, file)
    console = terminal(stderr=to_stdout)
    where = "standard output" if to_stdout else output
    console.print(f"wrote {done.rows} predictions to {where}", soft_wrap=True)
    for note in done.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if done.truncated:
        console.print(f"{done.truncated} sentences cut to the length limit")
    for line in bad_row_lines(done.bad_rows, done.first_bad, "rows without a prediction"):
        console.print(line, highlight=False, soft_wrap=True)
    return 0


class _Done(NamedTuple):
    """What was written.

    Attributes:
        rows: how many.
        notes: on how they were read, a line each.
        truncated: how many sentences were cut.
        bad_rows: how many rows have no prediction, by reason.
        first_bad: what was wrong with the first of these.
    """

    rows: int
    notes: tuple[str, ...]
    truncated: int
    bad_rows: Mapping[str, int]
    first_bad: str


def _read(
    run: Run, options: Namespace, form: TaskSchema, on_bad_row: OnBadRow
) -> AbstractContextManager[Examples]:
    """Open the examples of the input, or of a split."""
    if options.input is None:
        return read_split(run, form, options.split, on_bad_row)
    return read_examples(options.input, form, options.input_format, on_bad_row)


def _answered(
    run: Run,
    options: Namespace,
    form: TaskSchema,
    form_out: OutputFormat,
    on_bad_row: OnBadRow,
    file: "IO[bytes] | _Printer",
) -> _Done:
    """Answer examples, and write the answers as they are there."""
    predictor, shown = None, options.probabilities
    rows, truncated, bad_rows, first_bad = 0, 0, Counter[str](), ""
    reading = shown_on(terminal(stderr=options.output == STREAM), Reading())
    with _read(run, options, form, on_bad_row) as examples, reading.watch(examples.name) as show:
        for table in examples.tables:
            predictor = predictor or Predictor(run, device=options.device)
            split, found = predictor.answer(options.task, table)
            if form_out == "tsv":
                text = as_tsv(form, table, split, found, probabilities=shown, header=not rows)
            else:
                tagged, made = form.labels == "words", predictions(form, table, split, found)
                text = as_json_lines(table, made, tagged=tagged, probabilities=shown)
            file.write(text.encode("utf-8"))
            rows, truncated = rows + len(table), truncated + split.truncated
            bad_rows.update(table.bad_rows)
            first_bad = first_bad or table.first_bad
            show(rows, examples.tables.share)
        return _Done(rows, examples.notes, truncated, bad_rows, first_bad)


def _found(
    run: Run,
    options: Namespace,
    form: TaskSchema,
    form_out: OutputFormat,
    _on_bad_row: OnBadRow,
    file: "IO[bytes] | _Printer",
) -> _Done:
    """Find passages for anchors, and write them."""
    skips, how = options.on_bad_row == "skip", options.input_format
    with _read(run, options, anchors_of(form), "blank" if skips else "error") as asked:
        anchors = asked.tables.table()
    form = passages_of(schema(run, options.task))
    with read_examples(options.passages, form, how, "skip" if skips else "error") as among:
        passages = among.tables.table()
    predictor = Predictor(run, device=options.device)
    found = predictor.find(options.task, anchors, passages, options.top or _TOP)
    write = matches_as_tsv if form_out == "tsv" else matches_as_json_lines
    file.write(write(anchors, passages, found).encode("utf-8"))
    notes = (*asked.notes, *among.notes)
    return _Done(len(anchors), notes, found.truncated, anchors.bad_rows, anchors.first_bad)


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.predict",
        description="Predict every row of a file: a line each, in its order (id, prediction). A "
        "cell that a spreadsheet would evaluate or a terminal obey is written as ' and JSON.",
    )
    what, where = made.add_argument_group("what to predict"), made.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    what.add_argument("--task", required=True, metavar="NAME", help="a task of the run; needed")
    what.add_argument(
        "--input",
        type=one_file,
        metavar="FILE",
        help="its examples, as in the data files, labels or not: a file, its address (https://…), "
        "or - for standard input (default: those of --split)",
    )
    what.add_argument(
        "--split",
        metavar="NAME",
        help="its examples in the data files: a split that the recipe names, such as test, labels "
        "or not (default: those of --input)",
    )
    what.add_argument(
        "--input-format",
        choices=INPUT_FORMATS,
        default="auto",
        help="the format of input and passages; text: a sentence a line, with a tab between those "
        "of a pair (default: auto, as the data files; text on standard input)",
    )
    what.add_argument(
        "--passages",
        type=one_file,
        metavar="FILE",
        help="for a retrieval task: find for each row of the input, an anchor, the most similar "
        "passages of this file (default: the similarity of the anchor and passage of a row)",
    )
    what.add_argument(
        "--top",
        type=positive,
        metavar="N",
        help=f"how many of them (default: {_TOP})",
    )
    what.add_argument(
        "--on-bad-row",
        choices=["error", "skip"],
        default="error",
        help="what a malformed row does: end it, or keep its line with an empty prediction "
        "(default: error)",
    )
    where.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="the file to write; - for standard output; needed",
    )
    where.add_argument(
        "--output-format",
        choices=OUTPUT_FORMATS,
        default="auto",
        help="a table, or JSON lines (default: auto, jsonl if the file's name ends so, else tsv)",
    )
    where.add_argument(
        "--probabilities",
        action="store_true",
        help="write those of all classes or labels, or of each word's tag (default: the "
        "predictions alone)",
    )
    add_run_data(where)
    add_force(where)
    add_device(where)
    return made


def _check_input(options: Namespace) -> None:
    """Check that a command line says once what to predict.

    Raises:
        InputError: it does not, or has an option without effect.
    """
    if (options.input is None) == (options.split is None):
        raise InputError("--input, --split: give one of the two, the examples to predict")
    if options.input == options.passages == STREAM:
        raise InputError("--passages -: --input reads standard input; give a file for one of them")
    if options.input is not None and options.data is not None:
        raise InputError("--data: has no effect on the file of --input; leave one out")
    if options.input_format != AUTO and options.input is None and options.passages is None:
        raise InputError(
            "--input-format: the recipe says how the files of --split are written; leave it out"
        )


def _files_read(options: Namespace, run: Run) -> list[Path]:
    """Return the files that are read, which are not to be replaced by the predictions.

    Raises:
        InputError: the task has no such split, or its file is in no folder that is known.
    """
    given = [one for one in (options.passages, options.input) if isinstance(one, Path)]
    files = [Path("/dev/stdin") if one == STREAM else one for one in given]
    if options.input is not None:
        return files
    check_split(run.recipe, options.split, [options.task])
    found = origin(run.recipe, options.task, options.split)
    read = () if isinstance(found, HubSplit | HubStream) else found.files
    return [*files, *(one.path for one in read if isinstance(one.path, Path))]


class _Printer:
    """Writes to standard output, as UTF-8 wherever it goes."""

    def __init__(self) -> None:
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="backslashreplace")

    def write(self, text: bytes) -> None:
        """Write UTF-8."""
        sys.stdout.write(text.decode("utf-8"))
        sys.stdout.flush()


if __name__ == "__main__":
    run_cli(main)
