"""Read a run for a report: its files, and its answers on the dev data."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..data.rows import shorten
from ..data.task_schema import TaskSchema
from ..metrics.log import EVALUATIONS, STEPS
from ..metrics.read import Json, read_evaluation_lines, read_step_lines
from ..models.heads import best_of, word_f1
from ..runs.data_paths import origin
from ..runs.run import Run
from ..runs.scoring import answers, results_of, score_names, task_scores
from ..utils.errors import InputError

Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Steps and values, ``[n]`` each."""


class Mistake(NamedTuple):
    """An example that was answered wrong, ``certainty`` as in :class:`Answers`."""

    id: str
    sentences: tuple[str, ...]
    label: str
    prediction: str
    certainty: float


class Answers(NamedTuple):
    """A task's n dev examples and the model's answers.

    Attributes:
        form: the task's data.
        metric: the name of the deciding metric, or ``mean`` of all.
        score: by that metric.
        labels: float32 ``[N]``, one of each example or tagged word; ``[n, L]`` of several labels;
            of retrieval 1, the first rank; of question answering 1, the F1 of right answers.
        predictions: the same of the model; of retrieval the rank of an anchor's passage; of
            question answering the F1 of each answer.
        mistakes: of classes those answered wrong with most certainty (the probability that the
            model gave to its answer), of scores and ranks those farthest off (the distance).
    """

    form: TaskSchema
    metric: str
    score: float
    labels: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.float32]
    mistakes: list[Mistake]


def read_steps(run: Run) -> list[Json]:
    """Return the lines of a run's ``metrics.jsonl`` and of its pieces that were put aside.

    Raises:
        InputError: there are none, one is not right, or is of another run.
    """
    steps = read_step_lines(run.folder)
    if not steps:
        raise InputError(f"{run.folder / STEPS}: no step yet; train the run first")
    _check_names(run, STEPS, names(steps, "losses"), run.recipe.trained)
    return steps


def read_evaluations(run: Run) -> list[Json]:
    """Return the lines of a run's ``evaluations.jsonl``.

    Raises:
        InputError: the file cannot be read, a line is not right, or is of another run.
    """
    evaluations = read_evaluation_lines(run.folder)
    known = [*score_names(run.recipe), "overall"]
    _check_names(run, EVALUATIONS, names(evaluations, "scores"), known)
    return evaluations


def _check_names(run: Run, file: str, found: Iterable[str], known: Collection[str]) -> None:
    for name in found:
        if name not in known:
            raise InputError(
                f"{run.folder / file}: {shorten(name)!r} is not in recipe.toml; the two belong to "
                "different runs"
            )


def series(lines: list[Json], *path: str) -> Series:
    """Return one number of every line that has it, such as ``series(steps, "losses", "sst")``."""
    found = [(line["step"], value) for line in lines if (value := _at(line, path)) is not None]
    steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def series_by_name(lines: list[Json], *path: str) -> dict[str, Series]:
    """Return the :func:`series` of every number in a table of the lines, by name."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in (_at(line, path) or {}).items():
            steps, values = found.setdefault(name, ([], []))
            if value is not None:
                steps.append(line["step"])
                values.append(value)
    return {
        name: (np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64))
        for name, (steps, values) in found.items()
    }


def names(lines: list[Json], *path: str) -> list[str]:
    """Return the keys that a table of the lines has anywhere, in their order."""
    return list(dict.fromkeys(key for line in lines for key in _at(line, path) or ()))


def dev_answers(run: Run, device: torch.device, limit: int) -> dict[str, Answers]:
    """Let the best checkpoint answer the dev data of each task.

    Args:
        run: a trained run whose data are there.
        device: where to compute.
        limit: the most mistakes to keep of a task.
    """
    model, _ = run.trained_model(device)
    found = {}
    for task, form in run.recipe.formats.items():
        split = run.split(task, "dev")
        table = origin(run.recipe, task, "dev").table(
            run.recipe.split_schema(task, "dev"), labelled=True, on_bad_row=run.recipe.on_bad_row
        )
        assert split.labels is not None
        labels = np.asarray(split.labels)
        own = answers(model, split)
        predictions, certainty = own.predictions, own.certainties
        if own.ranking is not None:
            predictions = own.ranking.of_examples.astype(np.float32)
        if own.texts is not None:
            shares = [best_of(word_f1, *each) for each in zip(*own.texts, strict=True)]
            predictions, labels = np.array(shares, np.float32), np.ones(len(shares), np.float32)
        wrong = (predictions != labels).reshape(len(labels), -1).any(1)
        if not form.whole:
            certainty, wrong = np.abs(predictions - labels), np.ones(len(labels), dtype=bool)
        order = [i for i in np.argsort(-certainty, kind="stable") if wrong[i]][:limit]
        of_answers = np.repeat(np.arange(len(own.offsets) - 1), np.diff(own.offsets))
        mistakes = []
        for i in order:
            row = int(of_answers[i])
            sentences = tuple(column[row] for column in table.sentences)
            if table.words is not None:
                word = table.words[row][i - int(own.offsets[row])]
                sentences = (f"{word}: {sentences[0]}",)
            if own.texts is not None:
                sentences = (sentences[0], shorten(sentences[1], _CONTEXT))
            spell = form.spell_labels if own.ranking is None else _rank
            label, answer = (spell(x[i].ravel().tolist()) for x in (labels, predictions))
            if own.texts is not None:
                label = " | ".join(dict.fromkeys(own.texts.known[row])) or _NO_ANSWER
                answer = own.texts.predicted[row] or _NO_ANSWER
            mistakes.append(Mistake(table.ids[row], sentences, label, answer, float(certainty[i])))
        _, metric = score_names(run.recipe)[task]
        value = task_scores(run.recipe, task, results_of(form, own, labels))[task]
        found[task] = Answers(form, metric, value, labels, predictions, mistakes)
    return found


_NO_ANSWER = "no answer"
_CONTEXT = 300
"""Characters of a context that are shown."""


def _rank(values: Sequence[float]) -> str:
    return f"{values[0]:.0f}"


def most_confused(answers: Answers, count: int) -> npt.NDArray[np.int64]:
    """Return the numbers of all classes, or of ``count`` that most wrong answers involve.

    They ascend.
    """
    if answers.form.high < count:
        return np.arange(int(answers.form.high) + 1)
    pairs = np.stack([answers.labels, answers.predictions]).astype(np.int64)
    wrong = pairs[:, pairs[0] != pairs[1]]
    classes, errors = np.unique(wrong, return_counts=True)
    found = classes[np.argsort(-errors, kind="stable")[:count]]
    return np.sort(found) if len(found) else np.unique(pairs)[:count]


def confusion(
    answers: Answers, classes: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """Return how often each label (row) was answered by each class (column).

    Args:
        answers: of a task of C classes.
        classes: n of their numbers, ascending; None for all.

    Returns:
        ``[n, n]``, or with a last row and column for the other classes ``[n + 1, n + 1]``.
    """
    count = int(answers.form.high) + 1
    classes = np.arange(count) if classes is None else classes
    size = len(classes) + (len(classes) < count)
    numbers = np.stack([answers.labels, answers.predictions]).astype(np.int64)
    numbers = numbers[:, numbers[1] >= 0]  # of words that the model sees
    places = np.searchsorted(classes, numbers).clip(max=len(classes) - 1)
    places[classes[places] != numbers] = len(classes)
    return np.bincount(places[0] * size + places[1], minlength=size * size).reshape(size, size)


def label_shares(answers: Answers) -> npt.NDArray[np.float64]:
    """Return recall, precision and frequency of each of L labels, ``[L, 3]``.

    NaN for the recall of one that no example has, and the precision of one never predicted.
    """
    labels, predictions = answers.labels > 0, answers.predictions > 0
    found = (labels & predictions).sum(0)
    of_labels, of_predictions = labels.sum(0), predictions.sum(0)
    shares = np.full((labels.shape[1], 3), np.nan)
    np.divide(found, of_labels, out=shares[:, 0], where=of_labels > 0)
    np.divide(found, of_predictions, out=shares[:, 1], where=of_predictions > 0)
    shares[:, 2] = of_labels / len(labels)
    return shares


def layer_conflicts(
    steps: list[Json],
) -> tuple[list[str], list[str], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return how the tasks' gradients agree in each layer.

    Returns:
        L layers and N pairs of tasks by name; of each layer (row) and pair (column) the mean
        cosine and the share of records in which it was negative, ``[L, N]``, NaN where no record
        has both (phases train other tasks and layers); layers that one task alone reaches are left
        out.
    """
    records = [line for line in steps if "layer_cosines" in line]
    found = names(records, "layer_cosines")
    layers = [name for name in found if not name.startswith(("heads.", "adapters."))]
    by_layer = [series_by_name(records, "layer_cosines", layer) for layer in layers]
    pairs = list(dict.fromkeys(pair for by_pair in by_layer for pair in by_pair))
    cosines, conflicts = np.full((2, len(layers), len(pairs)), np.nan)
    for row, by_pair in enumerate(by_layer):
        for column, pair in enumerate(pairs):
            _, values = by_pair.get(pair, ((), np.array([])))
            if len(values):
                cosines[row, column] = values.mean()
                conflicts[row, column] = (values < 0).mean()
    return layers, pairs, cosines, conflicts


def _at(line: Json, path: tuple[str, ...]) -> Any:
    value: Any = line
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value
