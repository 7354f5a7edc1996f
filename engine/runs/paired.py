"""Compare groups of runs with a baseline, seed by seed.

Runs of one seed have the same batches and, as far as the settings allow, the same first weights, so
their scores rise and fall together.  The difference of two groups within each seed leaves that
out; its spread is what is left to chance.

With several groups against one baseline, some difference would look large by chance alone.
Intervals that all hold at once are wider (Dunnett 1955, "A Multiple Comparison Procedure for
Comparing Several Treatments with a Control", for the problem; here the bound of Bonferroni, which
needs no table of its own and is a little wider).  Their standard error comes from all groups
together, a randomized block design with seeds as blocks (Fisher 1935, "The Design of Experiments"):
score = group + seed + residual, residuals of one variance.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Of all intervals, two-sided."""

Scores = Mapping[int, float]
"""A score of the runs of a group, by their seeds."""


class Interval(NamedTuple):
    """Two-sided interval of a mean difference."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference is told from none."""
        return self.low > 0 or self.high < 0


class Difference(NamedTuple):
    """Difference of a group from the baseline, over the k seeds that both have.

    Attributes:
        seeds: these seeds, ascending, one at least.
        mean: of the differences.
        deviation: standard deviation of the differences (of a sample); None of one seed.
        alone: the t interval of this difference by itself, k - 1 degrees of freedom; None of one
            seed.
        simultaneous: the interval that holds together with those of all other groups; None of one
            seed, or where the layout has no residual variance to take.
    """

    seeds: tuple[int, ...]
    mean: float
    deviation: float | None
    alone: Interval | None
    simultaneous: Interval | None = None


class Layout(NamedTuple):
    """Two-way layout of M groups and n seeds, each pair once.

    Attributes:
        groups: M names, the baseline's first.
        seeds: n seeds, ascending.
        variance: of the residuals, pooled.
        freedom: its degrees of freedom, (M - 1) (n - 1), one at least.
    """

    groups: tuple[str, ...]
    seeds: tuple[int, ...]
    variance: float
    freedom: int


class Comparison(NamedTuple):
    """Groups against a baseline by one score.

    Attributes:
        differences: by group, without the baseline; None of one that shares no seed with it.
        layout: of the groups that have all seeds of the baseline; None where that is the baseline
            alone, or one seed.
        comparisons: how many intervals hold together.
    """

    differences: dict[str, Difference | None]
    layout: Layout | None
    comparisons: int


def compare(groups: Mapping[str, Scores], baseline: str) -> Comparison:
    """Compare groups with one of them.

    Args:
        groups: scores by seed, by group; a group without any has no difference.
        baseline: the name of the group that the others are compared with.

    Returns:
        The differences.  The half width of a simultaneous interval over k seeds is t s sqrt(2 / k),
        s^2 being the variance of the layout and t the quantile of Student's t at
        1 - (1 - LEVEL) / (2 C) for C intervals.  A group that lacks seeds of the baseline is no
        part of the layout, and its interval is as wide as its fewer seeds make it.
    """
    found = {
        name: paired_difference(scores, groups[baseline])
        for name, scores in groups.items()
        if name != baseline
    }
    layout = two_way_layout(groups, baseline)
    count = sum(one is not None and len(one.seeds) > 1 for one in found.values())
    if layout is not None:
        quantile = t_quantile(layout.freedom, count)
        found = {
            name: _with_simultaneous(one, quantile * math.sqrt(layout.variance))
            for name, one in found.items()
        }
    return Comparison(found, layout, count)


def paired_difference(scores: Scores, baseline: Scores) -> Difference | None:
    """Return the difference of a group from the baseline; None if no seed is in both."""
    seeds = tuple(sorted(scores.keys() & baseline.keys()))
    if not seeds:
        return None
    values = np.array([scores[seed] - baseline[seed] for seed in seeds])
    mean = float(values.mean())
    if len(seeds) == 1:
        return Difference(seeds, mean, None, None)
    deviation = float(values.std(ddof=1))
    half = t_quantile(len(seeds) - 1) * deviation / math.sqrt(len(seeds))
    return Difference(seeds, mean, deviation, Interval(mean - half, mean + half))


def two_way_layout(groups: Mapping[str, Scores], baseline: str) -> Layout | None:
    """Return the layout of the groups that have all seeds of the baseline.

    None where only the baseline does, or where it has one seed: nothing is left for residuals.
    """
    seeds = tuple(sorted(groups[baseline]))
    others = [name for name in groups if name != baseline and groups[name].keys() >= {*seeds}]
    freedom = len(others) * (len(seeds) - 1)
    if freedom < 1:
        return None
    names = (baseline, *others)
    table = np.array([[groups[name][seed] for seed in seeds] for name in names])
    return Layout(names, seeds, float((_residuals(table) ** 2).sum()) / freedom, freedom)


def t_quantile(freedom: int, intervals: int = 1) -> float:
    """Return the quantile of Student's t for two-sided intervals that hold together.

    Args:
        freedom: degrees of freedom.
        intervals: how many; their chances of failing are added up (Bonferroni).
    """
    from scipy.special import stdtrit  # takes a while to import

    return float(stdtrit(freedom, 1 - (1 - LEVEL) / (2 * intervals)))


def _with_simultaneous(one: Difference | None, scale: float) -> Difference | None:
    """Return a difference with its interval; ``scale`` is the quantile times the deviation."""
    if one is None or len(one.seeds) < 2:
        return one
    half = scale * math.sqrt(2 / len(one.seeds))
    return one._replace(simultaneous=Interval(one.mean - half, one.mean + half))


def _residuals(table: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what group and seed leave over of scores, ``[M, n]`` each."""
    rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    return np.asarray(table - rows - columns + table.mean())
