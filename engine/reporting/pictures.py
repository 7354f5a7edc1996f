"""Pictures of a run, drawn by matplotlib, as SVG that a page can carry within itself."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .record import Answers, Series, confusion

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "superbert",
}
_WIDE, _SQUARE = (5.4, 2.6), (3.6, 3.4)
_POINTS = 400
"""The most points of a curve; more would be closer than a pixel."""
_LEGEND_WIDTH, _LEGEND_MARK = 84, 8
"""Characters in a line of a curve's legend, and those that a name's mark takes the place of."""
_LEGEND_LINE = 0.18
"""Height of a further line, in inches."""
_LONG_NAME = 12
"""Characters that still fit below a column of a heatmap."""
_SMOOTHED_OVER = 25
"""Windows in a smoothed curve."""


def curves(
    named: Mapping[str, Series], label: str, *, smooth: bool = True, zero: bool = False
) -> str:
    """Draw curves over the steps; smoothed ones with their raw points behind them.

    Args:
        named: curves by name.
        label: of the vertical axis.
        smooth: draw running means.
        zero: draw a line at zero.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_WIDE)
        if zero:
            axes.axhline(0, color="#555555", linewidth=0.8)
        for name, (steps, values) in named.items():
            if len(steps) == 0:
                continue
            thin = slice(None, None, -(-len(steps) // _POINTS))
            if not smooth:
                axes.plot(steps, values, marker="." if len(steps) < 30 else "", label=name)
                continue
            mean = _running_mean(values, max(1, len(values) // _SMOOTHED_OVER))
            (line,) = axes.plot(steps[thin], mean[thin], label=name, linewidth=1.6)
            axes.plot(steps[thin], values[thin], ".", color=line.get_color(), alpha=0.2, zorder=0)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if len(named) > 1:
            columns = max(1, _LEGEND_WIDTH // (max(map(len, named)) + _LEGEND_MARK))
            figure.legend(ncols=min(len(named), columns), loc="outside upper center")
            lines = -(-len(named) // columns)
            figure.set_figheight(_WIDE[1] + _LEGEND_LINE * (lines - 1))
        return _svg(figure)


def heatmap(
    rows: Sequence[str], columns: Sequence[str], values: npt.NDArray[np.float64], *, signed: bool
) -> str:
    """Draw a matrix with its numbers, shares of one or, if ``signed``, cosines.

    NaN is left empty.
    """
    height = 1.6 + 0.3 * len(rows)
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _axes((2.6 + 0.9 * len(columns), height))
        largest = max(0.05, float(np.nanmax(np.abs(values)))) if signed else 1.0
        low, colours = (-largest, "RdBu") if signed else (0.0, "Reds")
        axes.imshow(values, cmap=colours, vmin=low, vmax=largest, aspect="auto")
        spelling = "z.2f" if signed else ".0%"
        texts = [["" if np.isnan(v) else format(v, spelling) for v in row] for row in values]
        numbers_in_cells(axes, values / largest, texts)
        axes.set_xticks(range(len(columns)), columns)
        if max(map(len, columns)) > _LONG_NAME:
            axes.tick_params("x", rotation=30, rotation_mode="xtick")
        axes.set_yticks(range(len(rows)), rows)
        return _svg(figure)


def confusion_matrix(answers: Answers) -> str:
    """Draw how often each label was answered by each class; a row's shades are its shares."""
    counts = confusion(answers)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = answers.form.classes or [str(number) for number in range(len(counts))]
    side = 1.6 + 0.42 * len(names)
    with mpl.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = _axes((max(side, _SQUARE[0]), max(side - 0.2, _SQUARE[1])))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 12:
            numbers_in_cells(axes, shares, [[str(count) for count in row] for row in counts])
        axes.set_xticks(range(len(names)), names, rotation=0 if len(names) <= 6 else 90)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="label")
        return _svg(figure)


def scatter(answers: Answers) -> str:
    """Draw predictions over labels, on the line where they are equal."""
    low, high = answers.form.low, answers.form.high
    with mpl.rc_context(_STYLE):
        figure, axes = _axes(_SQUARE)
        axes.plot([low, high], [low, high], color="#555555", linewidth=0.8)
        # More points than this hide each other, and make the page heavy.
        some = np.linspace(0, len(answers.labels) - 1, min(len(answers.labels), 1500)).astype(int)
        axes.plot(answers.labels[some], answers.predictions[some], ".", alpha=0.35, rasterized=True)
        axes.set(xlabel="label", ylabel="predicted", aspect="equal")
        return _svg(figure)


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    return figure, figure.add_subplot()


def numbers_in_cells(
    axes: Axes, shades: npt.NDArray[np.float64], texts: Sequence[Sequence[str]]
) -> None:
    """Write the numbers of a matrix into its cells, light on those whose shade is near 1 or -1."""
    for row, line in enumerate(texts):
        for column, text in enumerate(line):
            colour = "white" if abs(shades[row, column]) > 0.6 else "#222222"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)


def png(figure: Figure) -> bytes:
    """Return a picture as a PNG file's content."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _running_mean(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Return the mean of each value and up to ``width - 1`` before it."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    begins = np.maximum(ends - width, 0)
    return np.asarray((sums[ends] - sums[begins]) / (ends - begins))


def _svg(figure: Figure) -> str:
    """Return a picture as the address of an image."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode("ascii")
