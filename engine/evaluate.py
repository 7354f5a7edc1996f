"""``python -m engine.evaluate RUN``: score a run's best checkpoint on labelled data."""

import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from .cli.common import Parser, one_file, print_scores, run_cli, terminal
from .cli.data_progress import add_reading, reading_of
from .cli.options import add_device, add_run_data, with_run_data
from .cli.progress import report_data
from .data.addresses import Place
from .data.origins import DataFile
from .data.split import TokenizedSplit
from .runs.data_paths import check_split, origin
from .runs.run import Run, open_run
from .runs.scoring import Scores, score_splits, write_scores
from .runs.thresholds import describe_thresholds
from .runtime.precision import pick_device
from .utils.errors import InputError
from .utils.quoting import one_line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)

    run = whole = open_run(options.run)
    if not run.recipe.tasks:
        raise InputError(f"{options.run}: has no task; objectives are not scored")
    if options.input is not None:
        _check_alone(options)
    run = with_run_data(run, options.data)._replace(reading=reading_of(options, terminal()))
    if options.task is not None:
        run = _of_task(run, options.task)
    split = options.split or "dev"
    if options.input is None:
        check_split(run.recipe, split)
    splits = {task: _labelled(run, task, split, options.input) for task in run.recipe.tasks}
    model, progress = whole.trained_model(pick_device(options.device), merged=False)
    report_data(terminal(), splits.values())
    scores = score_splits(model, splits, run.recipe)
    if options.task is None:
        write_scores(run.folder, Scores(split, progress.step, scores, progress.averaged))
    elif not math.isfinite(scores[options.task]):
        raise InputError(
            f"{options.run}: what the model computes for {options.task} is not finite; train it "
            "again with a lower lr"
        )
    what_for = split if options.input is None else str(options.input)
    title = f"{what_for} scores of {progress.source}"
    print_scores(terminal(), title, scores, run.recipe)
    for task, form in run.recipe.formats.items():
        if cuts := describe_thresholds(model.head(task), form):
            note = (
                f"{task}: yes above a probability of {cuts} (chosen on the dev data, whose scores "
                "are optimistic)"
            )
            terminal().print(one_line(note), highlight=False, markup=False, soft_wrap=True)
    return 0


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.evaluate",
        description="Score a run's best checkpoint; print a table and, of all tasks, write "
        "metrics.json.",
    )
    what, where = made.add_argument_group("what to score"), made.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    what.add_argument(
        "--split",
        metavar="NAME",
        help="on which examples: dev, train, test where the recipe names files with labels, or "
        "another split that it names (default: dev)",
    )
    what.add_argument("--task", metavar="NAME", help="on this task alone (default: on all)")
    what.add_argument(
        "--input",
        type=one_file,
        metavar="FILE",
        help="on the examples of this file, or of that at this address, with their labels, as in "
        "the data files; --task says whose they are (default: on a split)",
    )
    add_run_data(where)
    add_device(where)
    add_reading(where)
    return made


def _check_alone(options: Namespace) -> None:
    """Check that ``--input`` is given with all that it needs, and no more.

    Raises:
        InputError: it is not.
    """
    if options.task is None:
        raise InputError(f"--input {options.input}: name the task of its examples by --task")
    for name in ("split", "data"):
        if getattr(options, name) is not None:
            raise InputError(f"--{name}: has no effect on the file of --input; leave one out")


def _of_task(run: Run, task: str) -> Run:
    """Return a run whose recipe has one of its tasks alone, which then makes up the overall score.

    Raises:
        InputError: it has no such task.
    """
    settings = run.recipe.tasks.get(task)
    if settings is None:
        raise InputError(f"--task {task}: {run.folder} has {run.task_names}")
    tasks = {task: settings.model_copy(update={"score_weight": 1.0})}
    return run._replace(recipe=run.recipe.model_copy(update={"tasks": tasks}))


def _labelled(run: Run, task: str, split: str, file: Place | None) -> TokenizedSplit:
    """Return the examples to score a task on: those of a file, or of a split.

    Raises:
        InputError: they have no labels, or cannot be read.
    """
    if file is not None:
        return run.read(run.recipe.formats[task], DataFile(file))
    form = run.recipe.split_schema(task, split)
    has_labels = form.labels == "none" or run.recipe.tasks[task].source is not None
    if split == "test" and not has_labels:
        raise InputError(
            f"--split test: {form.file(Path(), 'test')} of {task} has no labels; score a file that "
            f"has them by --task {task} --input FILE, or predict it by engine.predict"
        )
    return run.read(form, origin(run.recipe, task, split))


if __name__ == "__main__":
    run_cli(main)
