"""Average the weights of the best evaluations as the last phase ends (``average_best``).

Checkpoints of one training run, averaged with equal weights, often score better than the best of
them (Vaswani et al. 2017, section 6.1; "model soups", Wortsman et al. 2022).  As in the greedy soup
of the latter the average is kept only if it does not score worse on dev.

The candidates are the ``top`` checkpoints that the newest ``step`` checkpoint names.  So a run that
was killed, also while it averaged, makes the same average when it is resumed.
"""

from pathlib import Path

import torch
from rich.console import Console

from ..checkpoints.manifest import Progress, verify
from ..checkpoints.store import average_weights
from ..metrics.read import read_evaluation_lines
from ..runs.scoring import Criterion, Scores, score_splits, write_scores
from ..utils.errors import InputError
from .trainer import Trainer


def average_best(trainer: Trainer, progress: Progress, console: Console) -> None:
    """Average the weights of the best evaluations, and keep the average if it is not worse.

    All ranks must call.  Nothing is done where it was done before.

    Args:
        trainer: of the phase that ended, whose last checkpoint is written.
        progress: at its end.
        console: for a line on what came of it.

    Raises:
        InputError: a checkpoint cannot be read, or the average not be written.
    """
    if not trainer.average_best or not trainer.dev_sets:
        return
    checkpoints, ranks = trainer.run.checkpoints, trainer.ranks
    found: tuple[list[int], list[str]] | None = None
    if ranks.is_main and _damage(checkpoints.path("average", progress.step)):
        checkpoints.keep_top((progress,))
        damage = {step: _damage(checkpoints.path("top", step)) for step, _ in progress.top}
        whole = sorted(step for step, problem in damage.items() if not problem)
        found = whole, list(filter(None, damage.values()))
    found = ranks.broadcast(found)
    if found is None:
        return
    steps, problems = found
    for line in problems:
        console.print(f"{line}; left out of the average", soft_wrap=True, highlight=False)
    if len(steps) < 2:
        console.print("nothing to average: average_best needs two evaluations with scores")
        return
    weights = average_weights([checkpoints.path("top", step) for step in steps])
    flat = torch.zeros(trainer.parameters.numel)
    for name, view in trainer.parameters.named_views(flat):
        view.copy_(weights[name])
    with trainer.computing_with(flat):
        scores = score_splits(
            trainer.model, trainer.dev_sets, trainer.run.recipe, ranks, choose_thresholds=True
        )
    value, best = trainer.deciding_score(scores), progress.best_score
    assert best is not None, "some evaluation has a score"
    is_kept = value >= best  # not if it is NaN
    averaged = progress._replace(averaged=tuple(steps))
    criterion = Criterion.of(trainer.run.recipe)
    console.print(
        f"{averaged.source}: {criterion} {criterion.sign * value:.4f} on dev, of the best step "
        f"{progress.best_step} alone {criterion.sign * best:.4f}; "
        + ("the average is kept as the best" if is_kept else "it scores worse and is not kept"),
        soft_wrap=True,
        highlight=False,
    )
    if is_kept and ranks.is_main:
        # The checkpoint comes last: where there is one, the rest is done.
        write_scores(trainer.run.folder, Scores("dev", progress.step, scores, averaged.averaged))
        averaged = averaged._replace(best_score=value, best_step=progress.step)
        checkpoints.save_weights("average", averaged, weights, trainer.model.thresholds)
        checkpoints.keep("average", 1)


def discard_average(trainer: Trainer, progress: Progress) -> None:
    """Remove the average of a run that is trained on, which makes another one at its new end.

    Raises:
        InputError: the scores of the best weights, which are then the best again, are not there.
    """
    checkpoints, folder = trainer.run.checkpoints, trainer.run.folder
    if not trainer.ranks.is_main or not checkpoints.all("average"):
        return
    if progress.best_step is not None:
        lines = {line["step"]: line["scores"] for line in read_evaluation_lines(folder)}
        if progress.best_step not in lines:
            raise InputError(
                f"{folder}/evaluations.jsonl: has no scores of step {progress.best_step}, the best "
                "without the average; put back the file, or train the run again"
            )
        scores = lines[progress.best_step]
        write_scores(folder, Scores("dev", progress.best_step, scores))
    checkpoints.keep("average", 0)


def _damage(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint; empty of one that is as it was written."""
    try:
        verify(checkpoint)
    except InputError as error:
        return str(error)
    return ""
