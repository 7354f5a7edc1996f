"""Compare labels and predictions: pictures, counts and worst examples."""

from collections.abc import Mapping
from typing import Annotated, Self

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..utils.field_types import Count
from ..utils.quoting import markdown_text
from .labels import LITERAL, label
from .plots import numbers_in_cells, png
from .run_data import Answers, Mistake

_MOST = 32
"""The most rows of a matrix."""
_WITH_NUMBERS = 12
"""The most rows of a matrix whose cells have room for numbers."""
_COLUMNS = 6
"""Tasks beside one another in a picture."""


class Findings(BaseModel):
    """Summary of a task's answers, without the answers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    score: float
    """Accuracy or correlation."""
    low: int
    """The smallest label, that of the first row and column."""
    together: Annotated[int, Field(ge=1)] = 1
    """Neighbouring labels that are counted as one row and column."""
    counts: list[list[Count]]
    """Counts of each label (row) and prediction (column)."""
    over: int
    """Predictions above their label."""
    under: int
    """Predictions below their label."""
    worst: list[Mistake]
    """The worst first."""

    @model_validator(mode="after")
    def _is_square(self) -> Self:
        size = len(self.counts)
        if not 0 < size <= _MOST or any(len(row) != size for row in self.counts):
            raise ValueError(f"counts: expected 1 to {_MOST} rows, each as long")
        return self

    def without_texts(self) -> Self:
        """Return the same without the examples' sentences."""
        worst = [mistake._replace(sentences=()) for mistake in self.worst]
        return self.model_copy(update={"worst": worst})


def findings(answers: Answers) -> Findings:
    """Return what is to be said of a task's answers."""
    return Findings(
        score=answers.score,
        low=int(answers.form.low),
        together=labels_together(answers),
        counts=counts(answers).tolist(),
        over=int((answers.predictions > answers.labels).sum()),
        under=int((answers.predictions < answers.labels).sum()),
        worst=answers.mistakes,
    )


def counts(answers: Answers) -> npt.NDArray[np.int64]:
    """Return how often each label (row) got each prediction (column), both as whole numbers.

    Of several labels each is counted by itself, as 0 or 1; words that the model does not see are
    left out.

    Scores are rounded to the nearest label.  Of many labels neighbours are counted together.
    """
    low, high = _bounds(answers)
    together = labels_together(answers)
    seen = answers.predictions >= low if answers.form.whole else np.isfinite(answers.labels)
    places = [
        (np.floor(np.asarray(values, np.float64) + 0.5).clip(low, high) - low) // together
        for values in (answers.labels[seen], answers.predictions[seen])
    ]
    size = (high - low) // together + 1
    found = np.zeros((size, size), dtype=np.int64)
    np.add.at(found, tuple(place.astype(np.int64).clip(max=size - 1) for place in places), 1)
    return found


def labels_together(answers: Answers) -> int:
    """Return how many neighbouring labels are counted as one, so that there are few."""
    low, high = _bounds(answers)
    return -(-(high - low + 1) // _MOST)


def _bounds(answers: Answers) -> tuple[int, int]:
    """Return the smallest and the largest number of a label; of several labels each is 0 or 1."""
    several = answers.form.labels == "several"
    return (0, 1) if several else (int(answers.form.low), int(answers.form.high))


def heatmaps(answers: Mapping[str, Findings]) -> bytes:
    """Draw labels against predictions of every task side by side (PNG).

    A row's shades are its shares; its numbers count examples.
    """
    columns = min(len(answers), _COLUMNS)
    lines = -(-len(answers) // columns)
    with mpl.rc_context({**LITERAL, "font.size": 9}):
        figure = Figure(figsize=(3.4 * columns, 3.3 * lines), layout="constrained", dpi=120)
        for number, (task, found) in enumerate(answers.items(), start=1):
            matrix = np.array(found.counts)
            shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
            axes = figure.add_subplot(lines, columns, number)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            if len(matrix) <= _WITH_NUMBERS:
                numbers_in_cells(axes, shares, [[str(count) for count in row] for row in matrix])
            labels = [label(str(found.low + step * found.together)) for step in range(len(matrix))]
            axes.set_xticks(range(len(labels)), labels, rotation=90 if len(labels) > 8 else 0)
            axes.set_yticks(range(len(labels)), labels)
            title = f"{label(task)}  {found.score:.3f}"
            axes.set(title=title, xlabel="predicted", ylabel="label")
        return png(figure)


def markdown(title: str, answers: Mapping[str, Findings]) -> str:
    """Return counts of predictions over and under their labels, and the worst examples."""
    lines = [f"## {title}", "", "| task | examples | over | under |", "| --- | --- | --- | --- |"]
    for task, found in answers.items():
        examples = sum(map(sum, found.counts))
        lines.append(f"| {markdown_text(task)} | {examples:,} | {found.over:,} | {found.under:,} |")
    for task, found in answers.items():
        lines += ["", f"Worst of {markdown_text(task)} (label, prediction, id, text):", ""]
        for mistake in found.worst:
            text = " / ".join(sentence.strip() for sentence in mistake.sentences)
            known = (mistake.label, mistake.prediction, mistake.id, text)
            lines.append(f"- {', '.join(markdown_text(part) for part in known if part)}")
    return "\n".join(lines) + "\n"
