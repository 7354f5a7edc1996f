"""Predictions and scores of a model on whole splits."""

import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import FiniteFloat, TypeAdapter

from ..data.loader import evaluation_batches
from ..data.split import TokenizedSplit
from ..data.task_schema import TaskSchema
from ..distributed.ranks import Ranks
from ..models.heads import Metric, head_class
from ..models.multitask import MultitaskModel
from ..utils.errors import InputError
from ..utils.files import write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes

_NOT_FINITE = (
    "what the model computes is not finite; train it again with a lower lr, or with a precision of "
    "wider range (bf16, fp32)"
)
_MAX_TOKENS = 8192  # a batch; enough to fill the machine, little enough for any of them


def predict(
    model: MultitaskModel, split: TokenizedSplit, ranks: Ranks | None = None
) -> npt.NDArray[np.float32]:
    """Return a prediction for every example of a split: the first result of :func:`answers`.

    Raises:
        InputError: some are not finite.
    """
    return answers(model, split, ranks)[0]


def answers(
    model: MultitaskModel, split: TokenizedSplit, ranks: Ranks | None = None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Let a model answer every example of a split.

    Args:
        model: on any device; put into evaluation mode for the duration.
        split: of a task that the model has a head for.
        ranks: processes that share the work; each gets all answers.

    Returns:
        Predictions and certainties, float32 ``[n]`` each, in the split's order.  Predictions are
        class numbers, or scores within the label's range; a certainty is the probability that the
        model gives to the class (1 for scores).

    Raises:
        InputError: what the model computes for some examples is not finite.
    """
    predictions, certainties = _answers(model, split, ranks)
    if bad := np.count_nonzero(~np.isfinite(predictions)):
        raise InputError(f"{bad} of {len(split)} examples of {split.task}: {_NOT_FINITE}")
    return predictions, certainties


def _answers(
    model: MultitaskModel, split: TokenizedSplit, ranks: Ranks | None
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return what :func:`answers` does; NaN for examples whose outputs are not finite."""
    ranks = ranks or Ranks()
    found = torch.zeros(2, len(split))
    device = next(model.parameters()).device
    head = model.head(split.task)
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        batches = evaluation_batches(split, _MAX_TOKENS)
        for indices, batch in itertools.islice(batches, ranks.rank, None, ranks.size):
            (scores,) = model(batch.to(device), [split.task])
            assert isinstance(scores, torch.Tensor)
            finite = scores.isfinite().view(len(scores), -1).all(1)
            both = torch.stack([head.predict(scores).float(), head.certainty(scores).float()])
            both = both.where(finite, torch.nan)  # argmax makes a class of NaN, too
            found[:, torch.from_numpy(indices)] = both.cpu()
    model.train(was_training)
    ranks.sum_(found)
    predictions, certainties = found.numpy()
    return predictions, certainties


def metric_of(task: TaskSchema) -> Metric:
    """Return what a task is scored by: the metric of its kind of head."""
    metric = head_class(task.kind).metric
    assert metric is not None, f"{task.task} is an objective"
    return metric


def metric_name(task: TaskSchema) -> str:
    """Return the name of what a task is scored by, such as ``accuracy``."""
    return metric_of(task).name


def score(task: TaskSchema, predictions: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Return the metric of a task's predictions; NaN where a prediction is not finite."""
    predicted, wanted = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    if not np.isfinite(predicted).all():
        return math.nan
    return metric_of(task).function(predicted, wanted)


def score_splits(
    model: MultitaskModel, splits: Mapping[str, TokenizedSplit], ranks: Ranks | None = None
) -> dict[str, float]:
    """Score a model on a labelled split of each task, a work that ``ranks`` share.

    Returns:
        The score of each task, and ``overall``, their mean; nothing for no splits.  NaN where what
        the model computes is not finite.
    """
    scores = {}
    for task, split in splits.items():
        assert split.labels is not None, f"split of {task} has no labels"
        predictions, _ = _answers(model, split, ranks)
        form = model.head(task).task
        assert form is not None, f"{task} is an objective"
        scores[task] = score(form, predictions, split.labels)
    return scores and scores | {"overall": sum(scores.values()) / len(scores)}


class Scores(NamedTuple):
    """``metrics.json``: the scores of one evaluation.

    Attributes:
        split: ``dev`` or ``train``.
        step: of the checkpoint that was scored.
        scores: by task, and ``overall``.
    """

    split: str
    step: int
    scores: dict[str, FiniteFloat]


def write_scores(folder: Path, scores: Scores) -> None:
    """Write ``metrics.json`` into a run's folder.

    Raises:
        InputError: a score is not finite, or the disk is full, or the like.
    """
    for task, value in scores.scores.items():
        if not math.isfinite(value):
            raise InputError(f"{folder}: {scores.split} data of {task}: {_NOT_FINITE}")
    write_text(folder / "metrics.json", dump_json(scores._asdict(), indent=2) + "\n")


def read_scores(folder: Path, tasks: Iterable[str]) -> Scores:
    """Read ``metrics.json`` of a run on these tasks.

    Raises:
        InputError: it is missing or damaged, or lacks one of their scores.
    """
    file = folder / "metrics.json"
    try:
        found = TypeAdapter(Scores).validate_json(read_bytes(file))
    except (InputError, ValueError) as error:
        raise InputError(f"{file}: no scores to read ({error}); run engine.evaluate") from None
    for name in (*tasks, "overall"):
        if name not in found.scores:
            raise InputError(f"{file}: no score {name}; run engine.evaluate")
    return found
