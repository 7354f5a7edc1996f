"""Where a model errs: labels against predictions as pictures, counts and worst examples."""

from collections.abc import Mapping
from typing import Self

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, field_validator

from ..text import one_line
from .pictures import numbers_in_cells, png
from .record import Answers, Mistake

_MOST_LABELS = 64
"""Of a built-in task, with room."""


class Findings(BaseModel):
    """What is to be said of a task's answers, without the answers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    score: float
    """Accuracy or correlation."""
    low: int
    """The smallest label, that of the first row and column."""
    counts: list[list[int]]
    """How often each label (row) got each prediction (column)."""
    over: int
    """Predictions above their label."""
    under: int
    """Predictions below their label."""
    worst: list[Mistake]
    """The worst first."""

    @field_validator("counts")
    @classmethod
    def _is_square(cls, counts: list[list[int]]) -> list[list[int]]:
        if not 1 <= len(counts) <= _MOST_LABELS or {len(row) for row in counts} != {len(counts)}:
            raise ValueError(f"counts: expected a square of at most {_MOST_LABELS} rows")
        return counts

    def without_texts(self) -> Self:
        """Return the same without the examples' sentences."""
        worst = [mistake._replace(sentences=()) for mistake in self.worst]
        return self.model_copy(update={"worst": worst})


def findings(answers: Answers) -> Findings:
    """Return what is to be said of a task's answers."""
    return Findings(
        score=answers.score,
        low=int(answers.form.low),
        counts=counts(answers).tolist(),
        over=int((answers.predictions > answers.labels).sum()),
        under=int((answers.predictions < answers.labels).sum()),
        worst=answers.mistakes,
    )


def counts(answers: Answers) -> npt.NDArray[np.int64]:
    """Return how often each label (row) got each prediction (column), both as whole numbers.

    Scores are rounded to the nearest label.
    """
    low, high = int(answers.form.low), int(answers.form.high)
    places = [
        np.floor(np.asarray(values) + 0.5).astype(np.int64).clip(low, high) - low
        for values in (answers.labels, answers.predictions)
    ]
    found = np.zeros((high - low + 1, high - low + 1), dtype=np.int64)
    np.add.at(found, tuple(places), 1)
    return found


def heatmaps(answers: Mapping[str, Findings]) -> bytes:
    """Draw labels against predictions of every task side by side (PNG).

    A row's shades are its shares; its numbers count examples.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(3.4 * len(answers), 3.3), layout="constrained", dpi=120)
        for number, (task, found) in enumerate(answers.items(), start=1):
            matrix = np.array(found.counts)
            shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
            axes = figure.add_subplot(1, len(answers), number)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            numbers_in_cells(axes, shares, [[str(count) for count in row] for row in matrix])
            labels = [str(found.low + step) for step in range(len(matrix))]
            axes.set_xticks(range(len(labels)), labels)
            axes.set_yticks(range(len(labels)), labels)
            axes.set(title=f"{task}  {found.score:.3f}", xlabel="predicted", ylabel="label")
        return png(figure)


def markdown(title: str, answers: Mapping[str, Findings]) -> str:
    """Return counts of predictions over and under their labels, and the worst examples."""
    lines = [f"## {title}", "", "| task | examples | over | under |", "| --- | --- | --- | --- |"]
    for task, found in answers.items():
        examples = sum(map(sum, found.counts))
        lines.append(f"| {task} | {examples:,} | {found.over:,} | {found.under:,} |")
    for task, found in answers.items():
        lines += ["", f"Worst of {task} (label, prediction, id, text):", ""]
        for mistake in found.worst:
            text = " / ".join(sentence.strip() for sentence in mistake.sentences)
            known = (mistake.label, mistake.prediction, mistake.id, text)
            lines.append(f"- {', '.join(_escaped(part) for part in known if part)}")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Keep signs that mean something in Markdown as they are."""
    signs = "\\`*_[]>#|"
    escaped = "".join(f"\\{sign}" if sign in signs else sign for sign in one_line(text))
    return escaped.replace("<", "&lt;")  # a backslash before < is not understood everywhere
