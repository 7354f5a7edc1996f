"""``python -m engine.predict RUN``: predict a file's rows with a run's best checkpoint."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .cli.common import Parser, run_cli, terminal
from .cli.options import add_device, add_force
from .data.source import DataFile
from .data.table import OnBadRow
from .runs.run import open_run
from .runs.scoring import answers
from .runtime.precision import pick_device
from .utils.errors import InputError
from .utils.output_files import check_outputs, write_output
from .utils.quoting import table_cell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(
        prog=f"python -m {__package__}.predict",
        description="Predict every row of a file: a line each, in its order (id, prediction). A "
        "cell that a spreadsheet would evaluate or a terminal obey is written as ' and JSON.",
    )
    what, where = parser.add_argument_group("what to predict"), parser.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    what.add_argument("--task", required=True, metavar="NAME", help="a task of the run; needed")
    what.add_argument(
        "--input",
        required=True,
        type=Path,
        metavar="FILE",
        help="its examples, as in the data files, labels or not; needed",
    )
    what.add_argument(
        "--on-bad-row",
        choices=["error", "skip"],
        default="error",
        help="what a malformed row does: end it, or keep its line with an empty prediction "
        "(default: error)",
    )
    where.add_argument(
        "--output", required=True, type=Path, metavar="TSV", help="the file to write; needed"
    )
    add_force(where)
    add_device(where)
    options = parser.parse_args(arguments)

    run = open_run(options.run)
    replace = check_outputs([options.output], force=options.force, inputs=[options.input])
    if options.task not in run.recipe.tasks:
        known = ", ".join(run.recipe.tasks)
        raise InputError(f"--task {options.task}: {options.run} has {known}")
    form = run.recipe.formats[options.task].unchangeable
    # Every row is owed a line, so a skipped one keeps its place as a blank.
    on_bad_row: OnBadRow = "blank" if options.on_bad_row == "skip" else "error"
    split = run.read(form, DataFile(options.input), labelled=False, on_bad_row=on_bad_row)
    model, _ = run.trained_model(pick_device(options.device))
    found = answers(model, split)

    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(["id", "prediction"])
    of_rows = np.split(found.predictions, found.offsets[1:-1])
    cells = [form.spell_labels(values.ravel().tolist()) for values in of_rows]
    for blank in split.blank:
        cells[blank] = ""
    rows = zip(split.ids, cells, strict=True)
    writer.writerows(map(table_cell, row) for row in rows)
    write_output(options.output, text.getvalue(), replace=replace)
    console = terminal()
    console.print(f"wrote {len(split)} predictions to {options.output}", soft_wrap=True)
    for note in split.notes:
        console.print(note, highlight=False, soft_wrap=True)
    if split.truncated:
        console.print(f"{split.truncated} sentences cut to the length limit")
    for reason, count in split.bad_rows.items():
        console.print(f"{count} rows without a prediction ({reason})")
    return 0


if __name__ == "__main__":
    run_cli(main)
