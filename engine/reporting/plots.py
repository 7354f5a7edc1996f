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
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .labels import LITERAL, label
from .run_data import Answers, Series, confusion, most_confused

STYLE: Any = {
    **LITERAL,
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
_CHARACTER = 0.06
"""Width of a character, in inches."""
_MOST = 24
"""The most curves, or classes, of a picture."""
_SMOOTHED_OVER = 25
"""Windows in a smoothed curve."""


def extremes(means: Mapping[str, float]) -> list[str]:
    """Return the names that are drawn of more than a picture holds: of lowest and highest means.

    They keep their order.
    """
    ranked = sorted(means, key=lambda name: means[name])
    left_out = ranked[_MOST // 2 : len(ranked) - _MOST // 2] if len(ranked) > _MOST else []
    return [name for name in means if name not in set(left_out)]


def curves(
    named: Mapping[str, Series], quantity: str, *, smooth: bool = True, zero: bool = False
) -> str:
    """Draw curves over the steps; smoothed ones with their raw points behind them.

    Args:
        named: curves by name.
        quantity: what the vertical axis shows.
        smooth: draw running means.
        zero: draw a line at zero.
    """
    with mpl.rc_context(STYLE):
        figure, axes = _axes(_WIDE)
        if zero:
            axes.axhline(0, color="#555555", linewidth=0.8)
        lines: list[tuple[str, Line2D]] = []
        for name, (steps, values) in named.items():
            if len(steps) == 0:
                continue
            thin = slice(None, None, -(-len(steps) // _POINTS))
            if not smooth:
                (line,) = axes.plot(steps, values, marker="." if len(steps) < 30 else "")
                lines.append((label(name), line))
                continue
            mean = _running_mean(values, max(1, len(values) // _SMOOTHED_OVER))
            (line,) = axes.plot(steps[thin], mean[thin], linewidth=1.6)
            lines.append((label(name), line))
            axes.plot(steps[thin], values[thin], ".", color=line.get_color(), alpha=0.2, zorder=0)
        axes.set(xlabel="step", ylabel=quantity)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.ticklabel_format(axis="y", scilimits=(-3, 5))
        if len(named) > 1 and lines:
            _add_legend(figure, lines)
        return _svg(figure)


def _add_legend(figure: Figure, lines: Sequence[tuple[str, Line2D]]) -> None:
    """Name the curves above the axes, which keep their height."""
    columns = max(1, _LEGEND_WIDTH // (max(len(name) for name, _ in lines) + _LEGEND_MARK))
    legend = figure.legend(
        [line for _, line in lines],
        ["name"] * len(lines),  # matplotlib leaves out those that begin with an underscore
        ncols=min(len(lines), columns),
        loc="outside upper center",
    )
    for text, (name, _) in zip(legend.get_texts(), lines, strict=True):
        text.set_text(name)
    rows = -(-len(lines) // columns)
    figure.set_figheight(_WIDE[1] + _LEGEND_LINE * (rows - 1))


def heatmap(
    rows: Sequence[str], columns: Sequence[str], values: npt.NDArray[np.float64], *, signed: bool
) -> str:
    """Draw a matrix with its numbers, shares of one or, if ``signed``, cosines.

    NaN is left empty.
    """
    height, rows, columns = 1.6 + 0.3 * len(rows), [*map(label, rows)], [*map(label, columns)]
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = _axes((2.6 + 0.9 * len(columns), height))
        largest = float(np.nan_to_num(np.abs(values)).max(initial=0.05)) if signed else 1.0
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
    """Draw how often each label was answered by each class; a row's shades are its shares.

    Of many classes those are drawn that are confused most, and the others together.
    """
    classes = most_confused(answers, _MOST)
    counts = confusion(answers, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [label(answers.form.spell_label(number)) for number in classes]
    if others := int(answers.form.high) + 1 - len(classes):
        names.append(f"{others:,} others")
    longest = max(map(len, names))
    side = 1.6 + 0.42 * len(names) + _CHARACTER * longest
    turned = len(names) > 6 or longest > _LONG_NAME // 2
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = _axes((max(side, _SQUARE[0]), max(side - 0.2, _SQUARE[1])))
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(names) <= 12:
            numbers_in_cells(axes, shares, [[str(count) for count in row] for row in counts])
        axes.set_xticks(range(len(names)), names, rotation=90 if turned else 0)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="predicted", ylabel="label")
        return _svg(figure)


def scatter(answers: Answers) -> str:
    """Draw predictions over labels, on the line where they are equal."""
    low, high = answers.form.low, answers.form.high
    with mpl.rc_context(STYLE):
        figure, axes = _axes(_SQUARE)
        axes.plot([low, high], [low, high], color="#555555", linewidth=0.8)
        # More points than this hide each other, and make the page heavy.
        some = np.linspace(0, len(answers.labels) - 1, min(len(answers.labels), 1500)).astype(int)
        axes.plot(answers.labels[some], answers.predictions[some], ".", alpha=0.35, rasterized=True)
        axes.set(xlabel="label", ylabel="predicted", aspect="equal")
        return _svg(figure)


def ranks(answers: Answers) -> str:
    """Draw the share of anchors whose passage is among the first k, over k."""
    found, counts = np.unique(answers.predictions, return_counts=True)
    with mpl.rc_context(STYLE):
        figure, axes = _axes(_SQUARE)
        axes.step(found, np.cumsum(counts) / counts.sum(), where="post", marker=".")
        axes.set_xscale("log")
        axes.set(
            xlabel="first passages", ylabel="share of anchors that find theirs", ylim=(0, 1.02)
        )
        return _svg(figure)


def word_shares(answers: Answers) -> str:
    """Draw how many answers have which F1 of words."""
    with mpl.rc_context(STYLE):
        figure, axes = _axes(_SQUARE)
        axes.hist(answers.predictions, bins=10, range=(0, 1))
        axes.set(xlabel="F1 of the words of an answer", ylabel="questions", xlim=(0, 1))
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
