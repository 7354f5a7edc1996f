"""Pictures of a series: differences from a baseline, scores against conflict, its course."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .labels import LITERAL, label
from .plots import extremes, png
from .series_groups import Group, Study, labels
from .series_record import PARTS, Course

_STYLE: Any = {
    **LITERAL,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
_TOLD, _NOT_TOLD, _LINE = "#3b6fb6", "#9a9a9a", "#555555"
"""Colours: of a difference that the interval tells from 0, of others, of lines at 0."""
_ROW = 0.21
"""Height of a group's row, in inches."""
_PANEL = 2.3
"""Width of a panel, in inches."""
_MOST_PANELS = 12
_FAR = 3.0
"""What lies so many times as far out as most is drawn as an arrow at the edge."""


def differences(study: Study) -> bytes:
    """Draw the differences from the baseline by score, with simultaneous intervals (PNG).

    A row a group, the best first; a panel the deciding score, then the others, 12 at most.
    """
    scores = sorted(study.main_scores, key=study.criterion.score.__ne__)[:_MOST_PANELS]
    rows = [
        group
        for group in study.groups
        if any(study.difference(group, score) is not None for score in scores)
    ]
    names = labels(study.groups)
    with mpl.rc_context(_STYLE):
        size = (2.0 + _PANEL * len(scores), 1.1 + _ROW * max(len(rows), 3))
        figure = Figure(figsize=size, layout="constrained", dpi=120)
        panels = np.atleast_1d(figure.subplots(1, len(scores), sharey=True))
        for axes, score in zip(panels, scores, strict=True):
            _forest(axes, study, rows, score)
        panels[0].set_yticks(range(len(rows)), [label(names[group.key]) for group in rows])
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        figure.supxlabel(
            f"difference from {label(study.asked)}, same seeds; intervals hold together at 95 %",
            fontsize=9,
        )
        return png(figure)


class _Mark(NamedTuple):
    """A row's difference and how far its interval, if it has one, is from it."""

    row: int
    mean: float
    half: float
    told: bool

    @property
    def reach(self) -> float:
        return abs(self.mean) + self.half


def _forest(axes: Axes, study: Study, rows: Sequence[Group], score: str) -> None:
    marks = list(_marks(study, rows, score))
    limit = near_limit([mark.reach for mark in marks])
    axes.axvline(0, color=_LINE, linewidth=0.9)
    for mark in marks:
        colour = _TOLD if mark.told else _NOT_TOLD
        if mark.reach > limit:
            _far(axes, mark, limit, colour)
            continue
        axes.errorbar(
            mark.mean,
            mark.row,
            xerr=mark.half or None,
            fmt="o",
            markersize=4,
            color=colour,
            elinewidth=1.4,
            capsize=0,
        )
    axes.set_xlim(-1.06 * limit, 1.06 * limit)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(4, symmetric=True))
    axes.grid(visible=False, axis="y")
    axes.tick_params("y", length=0)
    axes.set_title(label(score), fontsize=9)


def _marks(study: Study, rows: Sequence[Group], score: str) -> Iterator[_Mark]:
    for row, group in enumerate(rows):
        found = study.difference(group, score)
        if found is not None:
            interval = found.simultaneous
            half = 0.0 if interval is None else interval.high - found.mean
            yield _Mark(row, found.mean, half, interval is not None and interval.excludes_zero)


def _far(axes: Axes, mark: _Mark, limit: float, colour: str) -> None:
    """Draw an arrow at the edge, with the number that is beyond it."""
    side = 1 if mark.mean > 0 else -1
    axes.plot(side * limit, mark.row, ">" if side > 0 else "<", color=colour, markersize=5)
    width = f" ± {mark.half:.3f}" if mark.half else ""
    axes.annotate(
        f"{mark.mean:+.3f}{width}",
        (side * limit, mark.row),
        (-6 * side, 0),
        textcoords="offset points",
        ha="right" if side > 0 else "left",
        va="center",
        fontsize=7.5,
        color=colour,
    )


def near_limit(sizes: Sequence[float]) -> float:
    """Return the largest of sizes that are not far larger than most; 1 of none above 0."""
    known = sorted(size for size in sizes if size > 0)
    if not known:
        return 1.0
    return max(size for size in known if size <= _FAR * statistics.median(known))


def conflict(study: Study) -> bytes | None:
    """Draw scores against conflict rates, and the course of conflict of the baseline (PNG).

    Without a baseline the course is that of the best group.  None where no run had two tasks in a
    step.
    """
    shown = [group for group in study.groups if group.conflict_rates]
    scored = [group for group in shown if group.scores(study.criterion.score)]
    if not shown:
        return None
    followed = _followed(study, shown)
    names = labels(study.groups)
    height = max(3.0, 0.9 + 0.16 * len(scored))
    with mpl.rc_context(_STYLE):
        lines = 1 + len(followed)
        figure = Figure(figsize=(9.0, height + 2.5 * len(followed)), layout="constrained", dpi=120)
        grid = figure.add_gridspec(lines, 2, height_ratios=[height, *[2.5] * len(followed)])
        if scored:
            _scatter(figure.add_subplot(grid[0, :]), study, scored, height)
        for line, group in enumerate(followed, start=1):
            rate, cosine = (figure.add_subplot(grid[line, column]) for column in (0, 1))
            _course(rate, cosine, group, names[group.key])
        return png(figure)


def _followed(study: Study, shown: Sequence[Group]) -> list[Group]:
    """Return the baselines, or the best group where there are none, that have a course."""
    known = [group for group in shown if any(run.course for run in group.runs)]
    baselines = [group for group in known if study.is_baseline(group)]
    return (baselines if study.asked else known[:1])[:_MOST_PANELS]


def _scatter(axes: Axes, study: Study, groups: Sequence[Group], height: float) -> None:
    """Draw a point a group, with bars of a standard deviation; names stand at the right."""
    names, score = labels(study.groups), study.criterion.score
    rates = [statistics.mean(group.conflict_rates) for group in groups]
    means = [statistics.mean(group.scores(score).values()) for group in groups]
    low, high = near_bounds(means)
    for group, rate, mean in zip(groups, rates, means, strict=True):
        colour = "#c44e52" if study.is_baseline(group) else _TOLD
        axes.errorbar(
            rate,
            min(max(mean, low), high),
            xerr=_deviation(group.conflict_rates),
            yerr=_deviation(list(group.scores(score).values())) if low <= mean <= high else None,
            fmt="o" if low <= mean <= high else ("v" if mean < low else "^"),
            markersize=4.5,
            color=colour,
            elinewidth=0.9,
            alpha=0.9,
        )
    space = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - space, high + space)
    bottom, top = axes.get_ylim()
    places = [(min(max(mean, low), high) - bottom) / (top - bottom) for mean in means]
    spread = spread_out(places, 0.15 / (height - 0.6))
    for group, rate, mean, place in zip(groups, rates, means, spread, strict=True):
        far = "" if low <= mean <= high else f"  {mean:.3f}"
        axes.annotate(
            label(names[group.key]) + far,
            (rate, min(max(mean, low), high)),
            (1.03, place),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            color="#c44e52" if study.is_baseline(group) else "#222222",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.5, "shrinkB": 3},
        )
    axes.set(xlabel="mean conflict rate", ylabel=label(str(study.criterion)))


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def near_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest of values that are not far from most."""
    middle = statistics.median(values)
    limit = near_limit([abs(value - middle) for value in values])
    near = [value for value in values if abs(value - middle) <= limit]
    return min(near), max(near)


def spread_out(places: Sequence[float], gap: float) -> list[float]:
    """Return places at least ``gap`` from each other, in their order, near where they were.

    They lie between 0 and 1 as long as there is room.
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


def _course(rate: Axes, cosine: Axes, group: Group, name: str) -> None:
    """Draw the mean course of a group's runs: conflict rate, and cosines by pair."""
    courses = [run.course for run in group.runs if run.course is not None]
    middles = (np.arange(PARTS) + 0.5) / PARTS
    rate.plot(middles, _mean_course([course.conflict_rate for course in courses]), color=_TOLD)
    rate.set(title=label(name), xlabel="share of the steps", ylabel="conflict rate")
    pairs = _cosines(courses)
    shown = extremes({pair: float(np.nanmean(values)) for pair, values in pairs.items()})
    for pair in shown:
        cosine.plot(middles, pairs[pair], linewidth=1.3)
    cosine.axhline(0, color=_LINE, linewidth=0.8)
    cosine.set(title=label(name), xlabel="share of the steps", ylabel="cosine")
    cosine.legend(
        cosine.get_lines()[: len(shown)],
        [label(pair) for pair in shown],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        fontsize=7.5,
    )
    for axes in (rate, cosine):
        axes.set_title(axes.get_title(), fontsize=9)
        axes.set_xlim(0, 1)


def _cosines(courses: Sequence[Course]) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean course of each pair's cosine, ``[PARTS]``, of those measured at all."""
    pairs = dict.fromkeys(pair for course in courses for pair in course.cosines)
    found = {
        pair: _mean_course([c.cosines[pair] for c in courses if pair in c.cosines])
        for pair in pairs
    }
    return {pair: values for pair, values in found.items() if not np.isnan(values).all()}


def _mean_course(courses: Sequence[Sequence[float | None]]) -> npt.NDArray[np.float64]:
    """Return the mean over runs of each part, ``[PARTS]``; NaN where nothing was measured."""
    table = np.array(courses, dtype=np.float64)
    known = ~np.isnan(table)
    sums = np.where(known, table, 0.0).sum(0)
    return np.divide(sums, known.sum(0), out=np.full(PARTS, np.nan), where=known.any(0))
