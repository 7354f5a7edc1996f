"""What there is to report of a run: its files, and its answers on the dev data."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..data.formats import FileFormat
from ..errors import InputError
from ..origins import origin
from ..reading import parse_json, read_bytes
from ..run import Run
from ..runtime.metrics_log import EVALUATIONS, STEPS
from ..runtime.step_lines import StepLines
from ..scoring import answers, score

Series = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]
"""Steps and values, ``[n]`` each."""

Json = dict[str, Any]


class Mistake(NamedTuple):
    """An example that was answered wrong, ``certainty`` as in :class:`Answers`."""

    id: str
    sentences: tuple[str, ...]
    label: str
    prediction: str
    certainty: float


class Answers(NamedTuple):
    """A task's n dev examples and what the model says of them.

    Attributes:
        form: the task's data.
        score: accuracy or correlation.
        labels: float32 ``[n]``.
        predictions: float32 ``[n]``.
        mistakes: of classes those answered wrong with most certainty (the probability that the
            model gave to its answer), of scores those farthest off (the distance).
    """

    form: FileFormat
    score: float
    labels: npt.NDArray[np.float32]
    predictions: npt.NDArray[np.float32]
    mistakes: list[Mistake]


def read_lines(path: Path) -> list[Json]:
    """Read a file of JSON lines; a last line that was cut off is left out.

    Raises:
        InputError: the file cannot be read, or another line is damaged.
    """
    lines = read_bytes(path).splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_json(line))
        except ValueError:
            if number < len(lines):
                raise InputError(f"{path}:{number}: not a line of metrics; remove it") from None
    return records


def read_steps(run: Run) -> list[Json]:
    """Return the lines of a run's ``metrics.jsonl`` and of its pieces that were put aside.

    Raises:
        InputError: there are none.
    """
    steps = [line for piece in StepLines(run.folder / STEPS).pieces for line in read_lines(piece)]
    if not steps:
        raise InputError(f"{run.folder / STEPS}: no step yet; train the run first")
    return steps


def read_evaluations(run: Run) -> list[Json]:
    """Return the lines of a run's ``evaluations.jsonl``."""
    return read_lines(run.folder / EVALUATIONS)


def series(lines: list[Json], *path: str) -> Series:
    """Return one number of every line that has it, such as ``series(steps, "losses", "sst")``."""
    found = [(line["step"], value) for line in lines if (value := _at(line, path)) is not None]
    steps, values = np.array(found, dtype=np.float64).reshape(-1, 2).T
    return steps, values


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
            form, labelled=True, on_bad_row=run.recipe.on_bad_row
        )
        assert split.labels is not None
        labels = np.asarray(split.labels)
        predictions, certainty = answers(model, split)
        wrong = predictions != labels
        if form.kind == "score":
            certainty, wrong = np.abs(predictions - labels), np.ones(len(labels), dtype=bool)
        order = [i for i in np.argsort(-certainty, kind="stable") if wrong[i]][:limit]
        mistakes = [
            Mistake(
                table.ids[i],
                tuple(column[i] for column in table.sentences),
                form.spell_label(labels[i]),
                form.spell_label(predictions[i]),
                float(certainty[i]),
            )
            for i in order
        ]
        value = score(form, predictions, labels)
        found[task] = Answers(form, value, labels, predictions, mistakes)
    return found


def confusion(answers: Answers) -> npt.NDArray[np.int64]:
    """Return how often each label (row) was answered by each class (column), ``[C, C]``."""
    count = int(answers.form.high) + 1
    places = answers.labels.astype(np.int64) * count + answers.predictions.astype(np.int64)
    return np.bincount(places, minlength=count * count).reshape(count, count)


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
    pairs = list(dict.fromkeys(p for name in layers for p in names(records, "layer_cosines", name)))
    cosines, conflicts = np.full((2, len(layers), len(pairs)), np.nan)
    for place in np.ndindex(cosines.shape):
        _, values = series(records, "layer_cosines", layers[place[0]], pairs[place[1]])
        if len(values):
            cosines[place], conflicts[place] = values.mean(), (values < 0).mean()
    return layers, pairs, cosines, conflicts


def _at(line: Json, path: tuple[str, ...]) -> Any:
    value: Any = line
    for key in path:
        if not isinstance(value, dict) or key not in value:
            return None
        value = value[key]
    return value
