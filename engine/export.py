"""``python -m engine.export RUN --to DIR``: a run as a folder that other libraries load."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .checkpoints.manifest import Progress
from .cli.common import Parser, run_cli, terminal
from .exporting.folder import check_free, write_model_folder
from .exporting.onnx_folder import check_packages, write_onnx_folder
from .exporting.task_folder import write_task_folder
from .metrics.log import EVALUATIONS
from .metrics.read import read_evaluation_lines
from .runs.predictor import schema
from .runs.run import Run, open_run
from .runs.scoring import METRICS, read_scores


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)

    check_free(options.to)
    if options.onnx:
        check_packages()
    run = open_run(options.run)
    if options.task is not None:
        schema(run, options.task)  # before the weights are read
    model, progress = run.trained_model(torch.device("cpu"), torch.float32)
    scores = _dev_scores(run, progress)
    if options.onnx:
        write_onnx_folder(run, model, options.task, progress, scores, options.to)
    elif options.task is None:
        write_model_folder(run, model, progress, scores, options.to)
    else:
        write_task_folder(run, model, options.task, progress, scores, options.to)
    terminal().print(f"wrote {options.to}", soft_wrap=True, highlight=False)
    return 0


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.export",
        description="Write a run's best checkpoint as a folder that transformers.AutoModel and "
        "sentence_transformers.SentenceTransformer load, with its heads and a model card; or one "
        "task as a model that transformers' pipelines load; or either as an ONNX graph.",
    )
    what, where = made.add_argument_group("what to export"), made.add_argument_group("where")
    what.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    what.add_argument(
        "--task",
        metavar="NAME",
        help="this task alone, for transformers' pipelines (default: the encoder)",
    )
    what.add_argument(
        "--onnx", action="store_true", help="a graph, model.onnx: sentence vectors, or the --task"
    )
    where.add_argument(
        "--to", required=True, type=Path, metavar="DIR", help="a new or empty folder; needed"
    )
    return made


def _dev_scores(run: Run, progress: Progress) -> Mapping[str, float | None] | None:
    """Return the dev scores of exported weights by task; None where none are known.

    An evaluation of another split replaces ``metrics.json``; those of the training are then left,
    which has none of an average.
    """
    if run.recipe.is_scored and (run.folder / METRICS).exists():
        measured = read_scores(run.folder, run.recipe.tasks)
        if measured.split == "dev" and measured.step == progress.step:
            return measured.scores
    if progress.averaged or not (run.folder / EVALUATIONS).exists():
        return None
    lines = {line["step"]: line["scores"] for line in read_evaluation_lines(run.folder)}
    return lines.get(progress.step)


if __name__ == "__main__":
    run_cli(main)
