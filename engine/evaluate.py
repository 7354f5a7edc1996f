"""``python -m engine.evaluate RUN``: score a run's best checkpoint on its labelled data."""

from collections.abc import Sequence
from pathlib import Path

from .cli.common import Parser, print_scores, run_cli, terminal
from .cli.options import add_device
from .cli.progress import report_data
from .runs.data_paths import reads_data_folder
from .runs.run import open_run
from .runs.scoring import Scores, score_splits, write_scores
from .runtime.precision import pick_device
from .utils.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(
        prog=f"python -m {__package__}.evaluate",
        description="Score a run's best checkpoint; print a table and write metrics.json.",
    )
    what, where = parser.add_argument_group("what to score"), parser.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    what.add_argument(
        "--split",
        choices=["dev", "train"],
        default="dev",
        help="on which examples (default: dev)",
    )
    where.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the data files (default: the run's own)"
    )
    add_device(where)
    options = parser.parse_args(arguments)

    run = open_run(options.run)
    if options.data is not None:
        if not reads_data_folder(run.recipe):
            raise InputError(
                f"--data {options.data}: no file of the tasks of {options.run} is looked for "
                "there; leave it out"
            )
        run = run.with_data(options.data)
    model, progress = run.trained_model(pick_device(options.device))
    splits = {task: run.split(task, options.split) for task in run.recipe.tasks}
    report_data(terminal(), splits.values())
    scores = score_splits(model, splits, run.recipe)
    write_scores(run.folder, Scores(options.split, progress.step, scores))
    title = f"{options.split} scores of step {progress.step}"
    print_scores(terminal(), title, scores, run.recipe)
    return 0


if __name__ == "__main__":
    run_cli(main)
