"""Predictions and scores of a model on whole splits."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import FiniteFloat, TypeAdapter
from torch import Tensor

from ..checkpoints.manifest import describe_source
from ..config.recipe import Recipe
from ..data.loader import evaluation_batches
from ..data.split import TokenizedSplit
from ..data.task_schema import TaskSchema
from ..data.windows import Spans
from ..distributed.ranks import Ranks
from ..models.heads import (
    AnswerTexts,
    Head,
    Metric,
    Ranking,
    Results,
    best_spans,
    metrics_for,
    rank_passages,
)
from ..models.multitask import MultitaskModel
from ..utils.arrays import ranges
from ..utils.errors import InputError
from ..utils.files import write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes
from .thresholds import fit_thresholds

_NOT_FINITE = (
    "what the model computes is not finite; train it again with a lower lr, or with a precision of "
    "wider range (bf16, fp32)"
)
METRICS = "metrics.json"
MAX_TOKENS = 8192
"""Of a batch: enough to fill a machine, few enough for any of them."""


class Answers(NamedTuple):
    """A model's answers on a split of n examples: N, one for each example or each tagged word.

    Of question answering n is the number of questions, whose windows are the split's examples.

    Attributes:
        predictions: float32 ``[N]``, class numbers, or values within the label's range; of several
            labels ``[N, L]``, 0 or 1.  -1 of a word that the model does not see, where no tag O
            stands for it.  Of question answering ``[N, 2]``, the first character of the answer in
            the context and the one behind its last; 0, 0 for none.
        certainties: float32 ``[N]``, the probability that the model gives to the class (1 for
            values).
        probabilities: float32 ``[N, C]`` of all classes or labels; None of values.
        offsets: int64 ``[n + 1]``; answers ``offsets[i]:offsets[i + 1]`` are of example i.
        ranking: of the split's passages, for retrieval; None where the split is not to be scored,
            or what the model computes is not finite.
        texts: of question answering; None as with the ranking.
    """

    predictions: npt.NDArray[np.float32]
    certainties: npt.NDArray[np.float32]
    probabilities: npt.NDArray[np.float32] | None
    offsets: npt.NDArray[np.int64]
    ranking: Ranking | None = None
    texts: AnswerTexts | None = None


def predict(
    model: MultitaskModel, split: TokenizedSplit, ranks: Ranks | None = None
) -> npt.NDArray[np.float32]:
    """Return the predictions for a split: those of :func:`answers`.

    Raises:
        InputError: some are not finite.
    """
    return answers(model, split, ranks).predictions


def answers(model: MultitaskModel, split: TokenizedSplit, ranks: Ranks | None = None) -> Answers:
    """Let a model answer every example of a split.

    Args:
        model: on any device; put into evaluation mode for the duration.
        split: of a task that the model has a head for.
        ranks: processes that share the work; each gets all answers.

    Returns:
        Answers in the split's order.

    Raises:
        InputError: what the model computes for some examples is not finite.
    """
    found = _answers(model, split, ranks)
    finite = _of_answers(torch.from_numpy(np.isfinite(found.predictions))).numpy()
    if not finite.all():
        count = len(found.offsets) - 1
        of_examples = np.repeat(np.arange(count), np.diff(found.offsets))
        bad = len(np.unique(of_examples[~finite]))
        raise InputError(f"{bad} of {count} examples of {split.task}: {_NOT_FINITE}")
    return found


def _answers(
    model: MultitaskModel,
    split: TokenizedSplit,
    ranks: Ranks | None,
    chosen_by: Sequence[Metric] = (),
) -> Answers:
    """Return what :func:`answers` does; NaN for answers whose scores are not finite.

    With ``chosen_by``, metrics of the task, thresholds are chosen on this split before.
    """
    head, offsets = model.head(split.task), split.answer_offsets
    scores = scores_of(model, split, ranks)
    if split.spans is not None:
        return _span_answers(head, scores, split, split.spans)
    if chosen_by and split.labels is not None:
        fit_thresholds(head, scores, split.labels, chosen_by, ranks or Ranks())
    finite = _of_answers(scores.isfinite())
    assert head.task is not None, f"{split.task} is an objective"
    predictions = head.predict(scores).float().numpy().copy()
    predictions[split.unseen] = head.task.outside
    predictions[~finite.numpy()] = math.nan  # argmax makes a class of it, too
    certainties = head.certainty(scores).float().where(finite, torch.nan)
    probabilities = head.probabilities(scores)
    ranking = None
    if split.text_ids is not None and split.labels is not None and bool(finite.all()):
        ranking = rank_passages(scores, np.asarray(split.text_ids))
    return Answers(
        predictions,
        certainties.numpy(),
        None if probabilities is None else probabilities.numpy(),
        offsets,
        ranking,
    )


def _of_answers(finite: Tensor) -> Tensor:
    """Return for each of N answers, which may be none, whether all of ``[N, …]`` holds."""
    return finite.view(len(finite), math.prod(finite.shape[1:])).all(1)


def _span_answers(head: Head, scores: Tensor, split: TokenizedSplit, spans: Spans) -> Answers:
    """Return the answers to the questions of a split of windows; NaN as in :func:`_answers`."""
    assert head.task is not None, f"{split.task} is an objective"
    found, certainty = best_spans(
        scores.numpy(),
        split.offsets,
        spans,
        head.task.max_answer_tokens,
        unanswerable=head.task.unanswerable,
    )
    texts = None
    if split.labels is not None and np.isfinite(found).all():
        rows = range(spans.num_rows)
        predicted = [spans.context(row)[slice(*found[row].astype(int))].strip() for row in rows]
        texts = AnswerTexts(predicted, [spans.answers_to(row) for row in rows])
    return Answers(found, certainty, None, np.arange(spans.num_rows + 1), texts=texts)


def scores_of(model: MultitaskModel, split: TokenizedSplit, ranks: Ranks | None = None) -> Tensor:
    """Return the head's scores of all N answers, ``[N, …]`` fp32 on the CPU."""
    ranks = ranks or Ranks()
    offsets, found = split.answer_offsets, torch.empty(0)
    device = next(model.parameters()).device
    was_training = model.training
    if was_training:  # else each of many short calls would go through all modules
        model.eval()
    with torch.inference_mode():
        batches = evaluation_batches(split, MAX_TOKENS)
        for indices, batch in itertools.islice(batches, ranks.rank, None, ranks.size):
            (scores,) = model(batch.to(device), [split.task])
            assert isinstance(scores, torch.Tensor)
            if not len(found):
                found = torch.zeros(int(offsets[-1]), *scores.shape[1:])
            places = ranges(offsets[indices], np.diff(offsets)[indices])
            found[torch.from_numpy(places)] = scores.float().cpu()
    if was_training:
        model.train()
    # The first rank has a batch, others may have none.
    shape = ranks.broadcast(list(found.shape))
    found = found if len(found) else torch.zeros(*shape)
    ranks.sum_(found)
    return found


MEAN = "mean"
"""Stands for the metric of a score that is the mean of several."""


def metrics_of(recipe: Recipe, task: str) -> list[Metric]:
    """Return what a task of a recipe is scored by, the first metric first."""
    known = metrics_for(recipe.formats[task])
    names = recipe.tasks[task].metrics
    by_name = {metric.name: metric for metric in known}
    return [by_name[name] for name in names] if names else [known[0]]


def score_names(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """Return task and metric of each score, by the score's name, without ``overall``.

    The deciding one is called as the task is: of the first metric, or the mean of all.  Others are
    called ``TASK.METRIC``.
    """
    found = {}
    for task in recipe.tasks:
        names = [metric.name for metric in metrics_of(recipe, task)]
        deciding = MEAN if _is_mean(recipe, task) else names.pop(0)
        found[task] = (task, deciding)
        found |= {f"{task}.{name}": (task, name) for name in names}
    return found


def _is_mean(recipe: Recipe, task: str) -> bool:
    """Return whether the mean of several metrics is a task's score."""
    return recipe.tasks[task].decided_by == "mean" and len(recipe.tasks[task].metrics) > 1


class Criterion(NamedTuple):
    """The dev score by which checkpoints, and runs, are compared: ``best_of`` of a recipe.

    Attributes:
        score: its name, ``overall`` or a task's.
        metric: the deciding metric of the task, or ``mean``, as of ``overall``.
        sign: 1, or -1 where less is better.
    """

    score: str
    metric: str
    sign: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Criterion":
        """Return the criterion of a recipe."""
        if recipe.best_of == "overall":
            return cls("overall", "mean", 1)
        _, metric = score_names(recipe)[recipe.best_of]
        return cls(recipe.best_of, metric, _sign(recipe, recipe.best_of))

    def value(self, scores: Mapping[str, float]) -> float:
        """Return the score times the sign, so that higher is better."""
        return self.sign * scores[self.score]

    def __str__(self) -> str:
        """``sts (mse, less is better)``."""
        less = ", less is better" if self.sign < 0 else ""
        return f"{self.score} ({self.metric}{less})"


def deciding_score(recipe: Recipe, scores: Mapping[str, float]) -> float:
    """Return the score by which checkpoints are compared, higher being better."""
    return Criterion.of(recipe).value(scores)


def _sign(recipe: Recipe, task: str) -> int:
    """Return 1 where a higher score of a task is better, -1 where a lower one is."""
    return 1 if _is_mean(recipe, task) else metrics_of(recipe, task)[0].sign


def task_scores(recipe: Recipe, task: str, results: Results) -> dict[str, float]:
    """Return the scores of a task by the names of :func:`score_names`, the deciding one first."""
    values = {metric.name: score(metric, results) for metric in metrics_of(recipe, task)}
    mean = sum(values.values()) / len(values)
    deciding = mean if _is_mean(recipe, task) else values.pop(next(iter(values)))
    return {task: deciding} | {f"{task}.{name}": value for name, value in values.items()}


def score(metric: Metric, results: Results) -> float:
    """Return a metric of results; NaN where a prediction is not finite."""
    if not np.isfinite(results.predictions).all():
        return math.nan
    return metric.function(results)


def results_of(task: TaskSchema, found: Answers, labels: npt.ArrayLike) -> Results:
    """Return answers and labels, for a metric."""
    probabilities = found.probabilities
    return Results(
        predictions=found.predictions.astype(np.float64),
        labels=np.asarray(labels, np.float64),
        probabilities=None if probabilities is None else probabilities.astype(np.float64),
        offsets=found.offsets,
        classes=task.classes,
        ranking=found.ranking,
        texts=found.texts,
    )


def score_splits(
    model: MultitaskModel,
    splits: Mapping[str, TokenizedSplit],
    recipe: Recipe,
    ranks: Ranks | None = None,
    *,
    choose_thresholds: bool = False,
) -> dict[str, float]:
    """Score a model on a labelled split of each task, a work that ``ranks`` share.

    With ``choose_thresholds`` those of the tasks whose recipe says so are chosen on these splits,
    and the model keeps them.

    Returns:
        The scores by the names of :func:`score_names`, and ``overall``, the mean of the deciding
        ones by ``tasks.NAME.score_weight``; an error counts by its negative.  Nothing for no
        splits.  NaN where what the model computes is not finite.
    """
    scores, deciding = dict[str, float](), list[float]()
    for task, split in splits.items():
        assert split.labels is not None, f"split of {task} has no labels"
        metrics = metrics_of(recipe, task) if choose_thresholds else ()
        found = _answers(model, split, ranks, metrics)
        scores |= task_scores(recipe, task, results_of(recipe.formats[task], found, split.labels))
        deciding.append(_sign(recipe, task) * scores[task])
    if not splits:
        return {}
    weights = [recipe.tasks[task].score_weight for task in splits]
    total = sum(weight * value for weight, value in zip(weights, deciding, strict=True) if weight)
    return scores | {"overall": total / sum(weights)}


class Scores(NamedTuple):
    """``metrics.json``: the scores of one evaluation.

    Attributes:
        split: ``dev``, ``train``, ``test`` or another that the recipe names.
        step: of the checkpoint that was scored.
        scores: by task, and ``overall``.
        averaged: where those weights are an average, the steps that it is made of.
        memory: of the process that trained the run last (engine/training/memory_parts.py); None of
            a run that is being trained.
    """

    split: str
    step: int
    scores: dict[str, FiniteFloat]
    averaged: tuple[int, ...] = ()
    memory: dict[str, str | int | float | None] | None = None

    @property
    def source(self) -> str:
        """What was scored: ``step 5``, or ``the average of steps 3, 5``."""
        return describe_source(self.step, self.averaged)


def write_scores(folder: Path, scores: Scores) -> None:
    """Write ``metrics.json`` into a run's folder; the memory that it has stays.

    Raises:
        InputError: a score is not finite, or the disk is full, or the like.
    """
    for task, value in scores.scores.items():
        if not math.isfinite(value):
            raise InputError(f"{folder}: {scores.split} data of {task}: {_NOT_FINITE}")
    content = scores._asdict()
    if not scores.averaged:
        del content["averaged"]
    if scores.memory is None:
        content = {key: value for key, value in content.items() if key != "memory"}
        content |= _memory_of(folder)
    _write_metrics(folder, content)


def write_memory(folder: Path, memory: Mapping[str, Any]) -> None:
    """Write the memory that a training took into ``metrics.json``, beside the scores if there are.

    Raises:
        InputError: the file is damaged, or the disk is full, or the like.
    """
    file = folder / METRICS
    content = _json_of(file) if file.exists() else {}
    _write_metrics(folder, content | {"memory": dict(memory)})


def _write_metrics(folder: Path, content: Mapping[str, Any]) -> None:
    write_text(folder / METRICS, dump_json(content, indent=2) + "\n")


def _json_of(file: Path) -> dict[str, Any]:
    try:
        return TypeAdapter(dict[str, Any]).validate_json(read_bytes(file))
    except ValueError as error:
        raise InputError(f"{file}: no scores to read ({error}); remove it") from None


def _memory_of(folder: Path) -> dict[str, Any]:
    """Return the memory that is written already: other scores are of the same training."""
    file = folder / METRICS
    if not file.exists():
        return {}
    with suppress(InputError):  # damaged: these scores replace it
        return {key: value for key, value in _json_of(file).items() if key == "memory"}
    return {}


def read_scores(folder: Path, tasks: Iterable[str]) -> Scores:
    """Read ``metrics.json`` of a run on these tasks.

    Raises:
        InputError: it is missing or damaged, or lacks one of their scores.
    """
    file = folder / METRICS
    try:
        found = TypeAdapter(Scores).validate_json(read_bytes(file))
    except (InputError, ValueError) as error:
        raise InputError(f"{file}: no scores to read ({error}); run engine.evaluate") from None
    for name in (*tasks, "overall"):
        if name not in found.scores:
            raise InputError(f"{file}: no score {name}; run engine.evaluate")
    return found
