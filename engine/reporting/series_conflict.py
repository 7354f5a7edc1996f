"""Draw scores of groups against their conflict rates, and the course of conflict."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .labels import label
from .plots import STYLE, extremes, png
from .series_forest import LINE, TOLD, near_limit
from .series_groups import Group, Study, labels
from .series_record import PARTS, Course

_BASELINE, _NAME = "#c44e52", "#222222"
"""Colours of the baseline, and of other names."""
_WIDTH, _COURSE = 9.0, 2.5
"""Width of the picture and height of a course, in inches."""
_NAME_HEIGHT, _LOWEST = 0.16, 3.0
"""Height of a name beside the points, and the least of their panel, in inches."""
_MOST = 6
"""The most baselines whose course is drawn."""


_CONNECTOR: Any = {
    "arrowstyle": "-",
    "color": "#c8c8c8",
    "linewidth": 0.5,
    "relpos": (0, 0.5),
    "shrinkA": 0,
    "shrinkB": 3,
}
"""From the left end of a name to its point."""


class _Point(NamedTuple):
    """A group among the points.

    Attributes:
        name: as it is drawn.
        rate: mean conflict rate.
        score: mean of the deciding score.
        deviations: of both; None of one seed.
        is_baseline: whether others are compared with it.
    """

    name: str
    rate: float
    score: float
    deviations: tuple[float | None, float | None]
    is_baseline: bool

    @property
    def colour(self) -> str:
        return _BASELINE if self.is_baseline else TOLD


def conflict(study: Study) -> bytes | None:
    """Draw scores against conflict rates, and below it the course of conflict (PNG).

    The course is that of each baseline; without any, of the best group.  None where no run had two
    tasks in a step.
    """
    names = labels(study.groups)
    shown = [group for group in study.groups if group.conflict_rates]
    if not shown:
        return None
    points = [
        _point(study, group, names[group.key])
        for group in reversed(shown)  # of names at one height the best comes highest
        if group.scores(study.criterion.score)
    ]
    followed = _followed(study, shown)
    height = max(_LOWEST, 0.9 + _NAME_HEIGHT * len(points))
    with mpl.rc_context(STYLE):
        size = (_WIDTH, height + _COURSE * len(followed))
        figure = Figure(figsize=size, layout="constrained", dpi=120)
        ratios = [height, *[_COURSE] * len(followed)]
        grid = figure.add_gridspec(len(ratios), 2, height_ratios=ratios)
        if points:
            axes = figure.add_subplot(grid[0, :])
            axes.set(xlabel="mean conflict rate", ylabel=label(str(study.criterion)))
            _draw_points(axes, points, _NAME_HEIGHT / (height - 0.6))
        for line, group in enumerate(followed, start=1):
            rate, cosine = (figure.add_subplot(grid[line, column]) for column in (0, 1))
            courses = [run.course for run in group.runs if run.course is not None]
            title = f"{label(names[group.key])}, {_runs(len(courses))}"
            _draw_rate(rate, courses, title)
            _draw_cosines(cosine, courses, title)
        return png(figure)


def _runs(count: int) -> str:
    return f"mean of {count} runs" if count > 1 else "1 run"


def _point(study: Study, group: Group, name: str) -> _Point:
    rates, scores = group.conflict_rates, list(group.scores(study.criterion.score).values())
    spreads = (_deviation(rates), _deviation(scores))
    means = statistics.mean(rates), statistics.mean(scores)
    return _Point(label(name), *means, spreads, study.is_baseline(group))


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _followed(study: Study, shown: Sequence[Group]) -> list[Group]:
    """Return the baselines, or the best group where there are none, that have a course."""
    known = [group for group in shown if any(run.course for run in group.runs)]
    baselines = [group for group in known if study.is_baseline(group)]
    return (baselines if study.asked else known[:1])[:_MOST]


def _draw_points(axes: Axes, points: Sequence[_Point], gap: float) -> None:
    """Draw a point a group, with bars of a standard deviation, and the names at the right.

    What is far from the others is an arrow at the edge, with its score by its name.
    """
    low, high = near_bounds([point.score for point in points])
    reach = [point.deviations[1] or 0.0 for point in points if low <= point.score <= high]
    space = max(0.06 * (high - low), statistics.median(reach)) or 0.01
    bottom, top = low - space, high + space
    axes.set_ylim(bottom, top)
    ends = [min(max(point.score, bottom), top) for point in points]
    for point, end in zip(points, ends, strict=True):
        near = end == point.score
        axes.errorbar(
            point.rate,
            end,
            xerr=point.deviations[0],
            yerr=point.deviations[1] if near else None,
            fmt="o" if near else ("v" if end == bottom else "^"),
            markersize=4.5,
            color=point.colour,
            ecolor=(point.colour, 0.35),
            elinewidth=0.9,
            clip_on=near,
            zorder=3,
        )
    places = spread_out([(end - bottom) / (top - bottom) for end in ends], gap)
    for point, end, place in zip(points, ends, places, strict=True):
        axes.annotate(
            point.name if end == point.score else f"{point.name}  {point.score:.3f}",
            (point.rate, end),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color=_BASELINE if point.is_baseline else _NAME,
            arrowprops=_CONNECTOR,
        )


def near_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest of values that are not far from most."""
    middle = statistics.median(values)
    limit = near_limit([abs(value - middle) for value in values])
    near = [value for value in values if abs(value - middle) <= limit]
    return min(near), max(near)


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Return places at least ``gap`` from each other, in their order, near where they were.

    They lie between 0 and 1; gaps that do not fit are made smaller, all alike.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    gap = min(gap, 1 / max(1, len(places) - 1))
    found, below = list(places), -gap
    for i in order:
        found[i] = below = max(found[i], below + gap)
    above = 1.0 + gap
    for i in reversed(order):
        found[i] = above = min(found[i], above - gap)
    return found


_MIDDLES = (np.arange(PARTS) + 0.5) / PARTS
"""Of the parts of a run, as shares of its steps, ``[PARTS]``."""


def _draw_rate(axes: Axes, courses: Sequence[Course], title: str) -> None:
    axes.plot(_MIDDLES, mean_course([course.conflict_rate for course in courses]), color=TOLD)
    axes.set(xlabel="share of the steps", ylabel="conflict rate", xlim=(0, 1))
    axes.set_title(title, fontsize=9)


def _draw_cosines(axes: Axes, courses: Sequence[Course], title: str) -> None:
    pairs = _cosines(courses)
    shown = extremes({pair: float(np.nanmean(values)) for pair, values in pairs.items()})
    axes.axhline(0, color=LINE, linewidth=0.8)
    lines = [axes.plot(_MIDDLES, pairs[pair], linewidth=1.3)[0] for pair in shown]
    axes.set(xlabel="share of the steps", ylabel="cosine", xlim=(0, 1))
    axes.set_title(title, fontsize=9)
    if not lines:
        return
    legend = axes.legend(
        lines,
        ["name"] * len(lines),  # matplotlib leaves out those that begin with an underscore
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=7.5,
    )
    for text, pair in zip(legend.get_texts(), shown, strict=True):
        text.set_text(label(pair))


def _cosines(courses: Sequence[Course]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean course of each pair's cosine, ``[PARTS]``, of those measured at all."""
    pairs = dict.fromkeys(pair for course in courses for pair in course.cosines)
    found = {
        pair: mean_course([c.cosines[pair] for c in courses if pair in c.cosines]) for pair in pairs
    }
    return {pair: values for pair, values in found.items() if not np.isnan(values).all()}


def mean_course(courses: Sequence[Sequence[float | None]]) -> npt.NDArray[np.float64]:
    """Return the mean over runs of each part, ``[PARTS]``; NaN where nothing was measured."""
    table = np.array(courses, dtype=np.float64).reshape(-1, PARTS)
    known = ~np.isnan(table)
    sums = np.where(known, table, 0.0).sum(0)
    return np.divide(sums, known.sum(0), out=np.full(PARTS, np.nan), where=known.any(0))
