"""End runs whose numbers do not stay finite, and write down the batch at which they began."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.manifest import Progress
from ..data.collate import PackedBatch
from ..data.loader import TrainingLoader
from ..data.tokenizer import Tokenizer
from ..metrics.log import MetricsLog
from ..utils.errors import DivergedError
from ..utils.files import write_text
from ..utils.finite import all_finite
from ..utils.json_text import dump_json
from .trainer import Trainer


def check_skipped(
    trainer: Trainer, log: MetricsLog, progress: Progress, loader: TrainingLoader
) -> None:
    """Stop a run that skipped too many steps in a row; write down the batch of the first.

    ``loader`` is closed then: two at once would read one stream.

    Raises:
        DivergedError: too many steps were skipped; the message names the file.
    """
    if not trainer.recipe.max_skipped or len(log.skipped) < trainer.recipe.max_skipped:
        return
    step, ranks = log.skipped[0], trainer.ranks
    name = f"skipped-{step:08}" + (f"-rank-{ranks.rank}" if ranks.size > 1 else "")
    path = trainer.run.folder / f"{name}.json"
    loader.close()
    with closing(trainer.loader(step - progress.phase_start)) as again:
        batches = list(islice(again, trainer.recipe.micro_batches))
    _write_batch(path, batches, trainer.run.tokenizer, {"step": step})
    raise DivergedError(
        f"loss or gradient not finite in {len(log.skipped)} steps in a row, from step {step} "
        f"on, whose batch is in {path}; {_remedy(trainer)}, or see that batch; "
        f"{kept_checkpoints(trainer)}"
    )


def is_worth_saving(
    trainer: Trainer,
    batches: Sequence[PackedBatch],
    log: MetricsLog,
    progress: Progress,
    scores: Mapping[str, float],
    *,
    stopping: bool,
) -> bool:
    """Return whether the state is worth a checkpoint; all ranks return the same.

    Skipped steps leave the weights as they are, so that a checkpoint of them would repeat one that
    is there and displace an older one.  Weights with which the model computes NaN are not saved.

    Args:
        trainer: of the run.
        batches: the micro-batches of the last step.
        log: with the last step written.
        progress: after that step and its evaluation.
        scores: on the dev data after it, if they were asked for.
        stopping: whether the run stops after this step.

    Raises:
        DivergedError: the run cannot go on, or must not end, with such numbers.
    """
    ends = trainer.has_ended(progress)
    is_last, was_skipped = ends or stopping, _was_skipped(trainer, log)
    unscored = [task for task, score in scores.items() if not math.isfinite(score)]
    good = (
        trainer.ranks.all(trainer.state.is_finite),
        trainer.ranks.all(_computes_finite(trainer, batches)),
    )
    if not good[0]:
        what = "weights or moments are not finite"
    elif not good[1] and (log.skipped or is_last):
        what = "what the model computes is not finite"
    elif ends and unscored:
        what = f"what the model computes for the dev data of {unscored[0]} is not finite"
    elif ends and was_skipped and (len(log.skipped) > 1 or log.skipped[0] == log.start):
        what = (
            f"no step since step {log.skipped[0]} could be trained, loss or gradient was not finite"
        )
    else:
        return good[1] and (is_last or not was_skipped)
    phase = f"phase {trainer.name}, " if trainer.name else ""
    raise DivergedError(
        f"{phase}after step {progress.step}: {what}; {_remedy(trainer)}; "
        f"{kept_checkpoints(trainer)}"
    )


def _computes_finite(trainer: Trainer, batches: Sequence[PackedBatch]) -> bool:
    """Return whether outputs of the model, and losses of objectives, on a batch are finite."""
    model, batch = trainer.model.eval(), batches[-1]
    with torch.inference_mode():
        scores = model(batch, batch.tasks)
        losses = model.losses(scores, batch, batch.tasks)
        of_tasks = zip(batch.tasks, scores, losses, strict=True)
        finite = all_finite(
            own if model.head(task).is_scored else loss for task, own, loss in of_tasks
        )
    model.train()
    return finite


def _was_skipped(trainer: Trainer, log: MetricsLog) -> bool:
    """Return whether the last step was skipped, other than to lower the loss scale."""
    if not log.skipped:
        return False
    scale, losses = trainer.step.loss_scale, log.latest["losses"].values()
    return scale is None or not scale.can_shrink or None in losses


def _remedy(trainer: Trainer) -> str:
    recipe = trainer.recipe
    return f"lower lr (now {recipe.lr:g}) or raise warmup (now {recipe.warmup:g})"


def kept_checkpoints(trainer: Trainer) -> str:
    """Return the names of the checkpoints that are left, for a message."""
    trainer.checkpoint_writer.wait()
    checkpoints = trainer.run.checkpoints
    names = [path.name for kind in ("best", "step") for path in checkpoints.all(kind)[:1]]
    return f"kept: {', '.join(names)}" if names else "there is no checkpoint"


def _write_batch(
    path: Path, batches: Iterable[PackedBatch], tokenizer: Tokenizer, why: dict[str, Any]
) -> None:
    """Write a step's examples as readable JSON: tokens, text and label of each.

    Raises:
        InputError: the file cannot be written, because the disk is full or the like.
    """
    tasks: dict[str, list[dict[str, Any]]] = {}
    for batch in batches:
        for number, task in enumerate(batch.tasks):
            tasks.setdefault(task, []).extend(_examples(batch, number, tokenizer))
    write_text(path, dump_json(why | {"tasks": tasks}, indent=1) + "\n")


def _examples(batch: PackedBatch, number: int, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    first, count = batch.task_offsets[number], batch.examples[number]
    bounds = list(pairwise(batch.cu_seqlens.tolist()))
    labels = batch.labels[number]
    for example in range(count):
        own = [first + example + column * count for column in range(batch.columns[number])]
        tokens = [batch.input_ids[slice(*bounds[sequence])].tolist() for sequence in own]
        yield {
            "text": [tokenizer.decode(ids) for ids in tokens],
            "tokens": tokens,
            "label": labels[example].tolist() if isinstance(labels, Tensor) else None,
        }
