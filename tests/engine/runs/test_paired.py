"""Paired differences and their intervals, against scipy, statsmodels' formulas and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from engine.runs.paired import compare, paired_difference, t_quantile, two_way_layout

BASE = {0: 0.50, 1: 0.56, 2: 0.53}
OTHER = {0: 0.52, 1: 0.57, 2: 0.56}


def random_groups(count: int, seeds: int, scale: float = 1.0) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(7)
    of_seed = rng.normal(size=seeds) * 5
    return {
        f"m{group}": {
            seed: scale * float(group / 10 + of_seed[seed] + rng.normal()) for seed in range(seeds)
        }
        for group in range(count)
    }


def test_a_difference_by_hand():
    """Differences 0.02, 0.01, 0.03: mean 0.02, deviation 0.01, t of 2 degrees 4.302653."""
    found = paired_difference(OTHER, BASE)
    assert found.seeds == (0, 1, 2)
    assert found.mean == pytest.approx(0.02, abs=1e-12)
    assert found.deviation == pytest.approx(0.01, abs=1e-12)
    half = 4.30265272991 * 0.01 / math.sqrt(3)
    assert found.alone == pytest.approx((0.02 - half, 0.02 + half), abs=1e-9)
    assert not found.alone.excludes_zero


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
def test_an_interval_alone_is_scipys(scale):
    groups = random_groups(2, 6, scale)
    found = paired_difference(groups["m1"], groups["m0"])
    values = [list(groups[name].values()) for name in ("m1", "m0")]
    assert found.alone == pytest.approx(stats.ttest_rel(*values).confidence_interval(0.95))


def test_the_pooled_variance_by_hand():
    """Two groups: the variance of the differences is twice that of the residuals."""
    layout = two_way_layout({"a": BASE, "b": OTHER}, "a")
    assert (layout.groups, layout.seeds, layout.freedom) == (("a", "b"), (0, 1, 2), 2)
    assert layout.variance == pytest.approx(0.01**2 / 2)


def test_the_pooled_variance_is_that_of_least_squares():
    groups = random_groups(5, 4)
    layout = two_way_layout(groups, "m2")
    rows = [(group, seed) for group in range(5) for seed in range(4)]
    design = np.zeros((20, 9))
    for row, (group, seed) in enumerate(rows):
        design[row, group] = design[row, 5 + seed] = 1
    y = np.array([groups[f"m{group}"][seed] for group, seed in rows])
    residual = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    freedom = 20 - np.linalg.matrix_rank(design)
    assert layout.freedom == freedom == 4 * 3
    assert layout.variance == pytest.approx(residual @ residual / freedom)


def test_with_one_comparison_both_intervals_are_the_same():
    groups = random_groups(2, 5)
    found = compare(groups, "m0").differences["m1"]
    assert found.simultaneous == pytest.approx(found.alone)


def test_simultaneous_intervals_divide_the_chance_among_the_comparisons():
    groups = random_groups(6, 4)
    compared = compare(groups, "m0")
    assert compared.comparisons == 5
    half = stats.t.ppf(1 - 0.05 / 10, 15) * math.sqrt(2 * compared.layout.variance / 4)
    for found in compared.differences.values():
        low, high = found.simultaneous
        assert (low, high) == pytest.approx((found.mean - half, found.mean + half))


@pytest.mark.parametrize(("count", "size"), [(3, 4), (6, 5), (12, 4)])
def test_they_are_a_little_wider_than_dunnetts(count, size):
    """Scipy has Dunnett's quantile for the layout without blocks, of count (size - 1) degrees."""
    rng = np.random.default_rng(1)
    control, *others = rng.normal(size=(count, size))
    interval = stats.dunnett(*others, control=control, rng=rng).confidence_interval(0.95)
    variance = np.var([control, *others], axis=1, ddof=1).mean()
    half = (interval.high - interval.low)[0] / 2
    dunnett = half / math.sqrt(2 * variance / size)
    own = t_quantile(count * (size - 1), count - 1)
    assert stats.t.ppf(0.975, count * (size - 1)) < dunnett < own < 1.06 * dunnett


def test_they_hold_together_about_as_often_as_they_say():
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        blocks = rng.normal(size=4)
        groups = {
            str(group): dict(enumerate((blocks + rng.normal(size=4)).tolist()))
            for group in range(5)
        }
        found = compare(groups, "0").differences.values()
        held += not any(one.simultaneous.excludes_zero for one in found)
    # 95 % and a little more; 400 draws of 95 % are below 92 % once in 300 times.
    assert held >= 0.92 * 400


def test_one_seed_has_no_interval():
    compared = compare({"a": {3: 0.5}, "b": {3: 0.75}}, "a")
    found = compared.differences["b"]
    assert (found.seeds, found.mean) == ((3,), 0.25)
    assert found.deviation is found.alone is found.simultaneous is None
    assert compared.layout is None
    assert compared.comparisons == 0


def test_seeds_that_are_missing():
    """Only common seeds are paired; who lacks some is no part of the layout."""
    groups = random_groups(4, 5)
    full = compare({name: groups[name] for name in ("m0", "m1")}, "m0")
    del groups["m2"][1], groups["m2"][4]
    groups["m3"] = {3: groups["m3"][3], 9: 0.5}
    compared = compare({**groups, "none": {}, "other": {77: 0.5}}, "m0")
    assert compared.layout == full.layout
    assert compared.layout.groups == ("m0", "m1")
    assert compared.differences["none"] is compared.differences["other"] is None
    two, three = compared.differences["m2"], compared.differences["m3"]
    assert two.seeds == (0, 2, 3)
    assert two.alone == paired_difference(groups["m2"], groups["m0"]).alone
    assert three.seeds == (3,)
    assert three.simultaneous is None
    # Two intervals are asked for; the one of three seeds is wider.
    assert compared.comparisons == 2
    half = stats.t.ppf(1 - 0.05 / 4, 4) * math.sqrt(compared.layout.variance)
    assert np.ptp(two.simultaneous) == pytest.approx(2 * half * math.sqrt(2 / 3))
    assert np.ptp(compared.differences["m1"].simultaneous) == pytest.approx(
        2 * half * math.sqrt(2 / 5)
    )


def test_a_baseline_without_runs_gives_no_differences():
    compared = compare({"a": {}, "b": BASE, "c": OTHER}, "a")
    assert compared.layout is None
    assert set(compared.differences.values()) == {None}


def test_equal_scores_have_an_interval_of_no_width():
    compared = compare({"a": BASE, "b": dict(BASE), "c": dict(BASE)}, "a")
    for found in compared.differences.values():
        assert found.mean == 0.0
        assert found.simultaneous == pytest.approx((0, 0), abs=1e-12)
        assert not found.alone.excludes_zero
