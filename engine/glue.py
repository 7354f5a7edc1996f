"""``python -m engine.glue RUN --to DIR``: a run's answers as files for GLUE's server."""

from collections.abc import Sequence
from pathlib import Path

from .cli.common import Parser, run_cli, terminal
from .cli.options import add_device, add_run_data, with_run_data
from .exporting.folder import check_free
from .exporting.glue import read_tests, write_submission
from .runs.run import open_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)

    check_free(options.to)
    run = with_run_data(open_run(options.run), options.data)
    tables, lines = read_tests(run, "error" if options.on_bad_row == "error" else "blank")
    truncated = write_submission(run, tables, options.to, options.device)
    console = terminal()
    count = sum(map(len, tables.values()))
    names = ", ".join(file.name for file in tables)
    console.print(
        f"wrote {count:,} predictions to {options.to}: {names}", soft_wrap=True, highlight=False
    )
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False)
    if truncated:
        console.print(f"{truncated:,} sentences cut to the length limit")
    return 0


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.glue",
        description="Answer GLUE's test files with a run's best checkpoint, and write the files "
        "that its server wants: CoLA.tsv, SST-2.tsv, … (index, prediction).",
    )
    what, where = made.add_argument_group("what to answer"), made.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the folder of a run of recipe glue")
    what.add_argument(
        "--on-bad-row",
        choices=["error", "skip"],
        default="error",
        help="what a malformed row does: end it, or be answered as empty texts, since GLUE wants "
        "an answer to each (default: error)",
    )
    where.add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="a new or empty folder; needed"
    )
    add_run_data(where)
    add_device(where)
    return made


if __name__ == "__main__":
    run_cli(main)
