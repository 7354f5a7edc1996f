"""Draw the differences of groups from their baseline, a row a group and a panel a score."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .labels import label
from .plots import STYLE, png
from .series_groups import Group, Study, labels

TOLD, NOT_TOLD, LINE = "#3b6fb6", "#9a9a9a", "#555555"
"""Colours: of a difference that the interval tells from 0, of others, of lines at 0."""

_ROW = 0.21
"""Height of a group's row, in inches."""
_PANEL = 2.3
"""Width of a panel, in inches."""
_MOST = 12
"""The most panels."""
_FAR = 4.0
"""How many times as far out as most a row may reach, and still set the scale."""


class _Mark(NamedTuple):
    """A row's difference.

    Attributes:
        row: its number.
        mean: of the difference.
        half: width of the interval to one side; None without an interval.
        told: whether the interval excludes 0.
    """

    row: int
    mean: float
    half: float | None
    told: bool

    @property
    def reach(self) -> float:
        return abs(self.mean) + (self.half or 0.0)

    @property
    def colour(self) -> str:
        return TOLD if self.told else NOT_TOLD


def differences(study: Study) -> bytes:
    """Draw the differences from the baseline, with simultaneous intervals (PNG).

    The best group comes first, and the panel of the deciding score; of many scores 12 are drawn.
    """
    scores = sorted(study.main_scores, key=study.criterion.score.__ne__)[:_MOST]
    rows = [
        group
        for group in study.groups
        if any(study.difference(group, score) is not None for score in scores)
    ]
    names = labels(study.groups)
    with mpl.rc_context(STYLE):
        size = (2.0 + _PANEL * len(scores), 1.1 + _ROW * max(len(rows), 3))
        figure = Figure(figsize=size, layout="constrained", dpi=120)
        panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
        for axes, score in zip(panels, scores, strict=True):
            _draw_panel(axes, list(_marks(study, rows, score)))
            axes.set_title(label(score), fontsize=9)
        panels[0].set_yticks(range(len(rows)), [label(names[group.key]) for group in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        figure.supxlabel(_caption(study, names, len(scores)), fontsize=9)
        return png(figure)


def _caption(study: Study, names: Mapping[str, str], panels: int) -> str:
    """Return what is drawn; of the baselines of several recipes their common settings."""
    baselines = {names[key] for key in study.baselines.values()}
    name = baselines.pop() if len(baselines) == 1 else study.asked
    known = f"difference from {label(name)} of the same seeds"
    if panels == 1:
        return known
    return f"{known}; 95 % intervals of a panel hold together, blue ones exclude 0"


def _draw_panel(axes: Axes, marks: Sequence[_Mark]) -> None:
    limit = _limit(marks)
    axes.axvline(0, color=LINE, linewidth=0.9)
    for mark in marks:
        if abs(mark.mean) > limit:
            _draw_far(axes, mark, limit)
            continue
        face = "white" if mark.half is None else mark.colour
        axes.plot(mark.mean, mark.row, "o", color=mark.colour, markerfacecolor=face, markersize=4)
        if mark.half is not None:
            ends = (mark.mean - mark.half, mark.mean + mark.half)
            axes.plot(ends, (mark.row, mark.row), color=mark.colour, linewidth=1.4)
    axes.set_xlim(-1.06 * limit, 1.06 * limit)
    axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    axes.grid(visible=False, axis="y")
    axes.tick_params("y", length=0)


def _limit(marks: Sequence[_Mark]) -> float:
    """Return where the axis ends, by the differences and by the ends of the intervals."""
    means = [abs(mark.mean) for mark in marks]
    reaches = [mark.reach for mark in marks if mark.half is not None]
    return max((near_limit(sizes) for sizes in (means, reaches) if any(sizes)), default=1.0)


def _marks(study: Study, rows: Sequence[Group], score: str) -> Iterator[_Mark]:
    for row, group in enumerate(rows):
        found = study.difference(group, score)
        if found is None:
            continue
        interval = found.simultaneous
        if interval is None:
            yield _Mark(row, found.mean, None, told=False)
        else:
            half = (interval.high - interval.low) / 2
            yield _Mark(row, found.mean, half, interval.excludes_zero)


def _draw_far(axes: Axes, mark: _Mark, limit: float) -> None:
    """Draw an arrow at the edge, with the difference that is beyond it."""
    side = 1 if mark.mean > 0 else -1
    axes.plot(side * limit, mark.row, ">" if side > 0 else "<", color=mark.colour, markersize=5)
    width = "" if mark.half is None else f" ± {mark.half:.3f}"
    axes.annotate(
        f"{mark.mean:+z.3f}{width}",
        (side * limit, mark.row),
        (-6 * side, 0),
        textcoords="offset points",
        ha="right" if side > 0 else "left",
        va="center",
        fontsize=7.5,
        color=mark.colour,
    )


def near_limit(sizes: Sequence[float]) -> float:
    """Return the largest of sizes that are not far larger than most; 1 of none above 0."""
    known = [size for size in sizes if size > 0]
    if not known:
        return 1.0
    return max(size for size in known if size <= _FAR * statistics.median(known))
