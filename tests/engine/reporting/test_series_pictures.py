"""Pictures of a series: names of groups, scales, and places of labels."""

import itertools
from pathlib import Path

import numpy as np
from matplotlib.text import Text

from engine.reporting import series_conflict, series_forest
from engine.reporting.series_conflict import near_bounds, spread_out
from engine.reporting.series_forest import near_limit
from engine.reporting.series_groups import labels, make_study
from engine.reporting.series_read import collect
from engine.runtime.precision import pick_device

from .made_series import NOISE, scores_of, write_series


def test_names_are_as_short_as_they_can_be(series, tmp_path):
    records = collect([series], pick_device("cpu"))
    assert sorted(labels(make_study(records).groups).values()) == ["cagrad", "pcgrad", "sum"]
    other = write_series(
        tmp_path / "other", ["balance=sum,mgda"], 1, lambda *_: scores_of([0.5] * 3)
    )
    both = make_study(collect([series, other], pick_device("cpu")))
    assert sorted(labels(both.groups).values()) == [
        *("cagrad", "methods sum", "mgda", "other sum", "pcgrad")
    ]


def test_groups_without_settings_leave_the_names_of_others_short(series, tmp_path):
    def write(name: str, axes: list[str]) -> Path:
        return write_series(tmp_path / name, axes, 1, lambda *_: scores_of([0.5] * 3))

    layers = write("layers", ["balance=pcgrad", "balance_granularity=layer,tensor"])
    alone = [write(name, []) for name in ("alone", "tuned")]
    study = make_study(collect([series, layers, *alone], pick_device("cpu")))
    assert sorted(labels(study.groups).values()) == [
        *("alone", "cagrad", "pcgrad"),
        *(f"pcgrad, balance_granularity={value}" for value in ("layer", "tensor")),
        *("sum", "tuned"),
    ]


def test_thirty_groups_have_names_that_do_not_overlap(tmp_path, monkeypatch):
    values = ",".join(f"{0.1 + number / 1000:g}" for number in range(30))
    folder = write_series(
        tmp_path / "a",
        [f"lr={values}"],
        2,
        lambda point, seed: scores_of(
            [0.1 if point["lr"] == "0.1" else 0.5 + float(point["lr"]) / 9] * 3
        ),
    )
    figures = []
    for module in (series_conflict, series_forest):
        monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or b"")
    study = make_study(collect([folder], pick_device("cpu")), "lr=0.11")
    series_conflict.conflict(study)
    series_forest.differences(study)
    scatter, forest = figures
    for figure, texts in (
        (scatter, scatter.axes[0].texts),
        (forest, forest.axes[0].get_yticklabels()),
    ):
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in texts]  # without the line to a point
        assert len(boxes) >= 29
        heights = sorted((box.y0, box.y1) for box in boxes)
        for (_, top), (bottom, _) in itertools.pairwise(heights):
            assert bottom > top - 2.5  # of the line's own space above and below
    (far,) = [text for text in scatter.axes[0].texts if text.get_text() == "0.1  0.100"]
    assert far is not None


def test_only_what_lies_outside_is_an_arrow(tmp_path, monkeypatch):
    """Intervals set the scale, not the many differences of one seed, which have none."""
    methods = ["sum", "pcgrad", "cagrad", "mgda", "upgrad", "gradvac", "imtl_g", "nash_mtl", "krum"]

    def of_some_seeds(point, seed):
        number = methods.index(point["balance"])
        if seed and number > 2:
            return None
        values = 0.5 + 1e-4 * number - 0.4 * (number == 8) + NOISE[number % 3 * (number < 3), seed]
        return scores_of(values.tolist())

    folder = write_series(tmp_path / "a", [f"balance={','.join(methods)}"], 4, of_some_seeds)
    figures = []
    monkeypatch.setattr(series_forest, "png", lambda figure: figures.append(figure) or b"")
    series_forest.differences(make_study(collect([folder], pick_device("cpu")), "balance=sum"))
    for axes in figures[0].axes:
        (arrow,) = axes.texts
        (line,) = [one for one in axes.lines if one.get_marker() == "<"]
        assert float(arrow.get_text()) < line.get_xdata()[0] < -0.005


def test_differences_of_zero_do_not_set_the_scale(tmp_path, monkeypatch):
    shift = 2.0**-10  # exact, so that the mean difference is 0

    def scores(point, seed):
        return scores_of([0.5 + (shift if seed else -shift) * (point["balance"] == "mgda")] * 3)

    folder = write_series(tmp_path / "a", ["balance=sum,mgda"], 2, scores)
    figures = []
    monkeypatch.setattr(series_forest, "png", lambda figure: figures.append(figure) or b"")
    series_forest.differences(make_study(collect([folder], pick_device("cpu")), "balance=sum"))
    for axes in figures[0].axes:
        (interval,) = [line for line in axes.lines if len(line.get_xdata()) == 2][1:]
        assert interval.get_xdata()[1] <= axes.get_xlim()[1] < 2 * interval.get_xdata()[1]


def test_places_are_spread_out():
    assert spread_out([0.5], 0.1) == [0.5]
    assert spread_out([], 0.1) == []
    np.testing.assert_allclose(spread_out([0.2, 0.9, 0.5], 0.1), [0.2, 0.9, 0.5])
    np.testing.assert_allclose(spread_out([0.5, 0.5, 0.5], 0.1), [0.5, 0.6, 0.7])
    np.testing.assert_allclose(spread_out([1.0, 1.0, 0.0], 0.25), [0.75, 1.0, 0.0])
    np.testing.assert_allclose(spread_out([0.3] * 5, 0.5), [0, 0.25, 0.5, 0.75, 1])


def test_what_is_far_from_most_does_not_set_the_scale():
    assert near_limit([1, 2, 3, 100]) == 3
    assert near_limit([]) == near_limit([0.0, 0.0]) == 1.0
    assert near_bounds([0.5, 0.51, 0.52, 0.1]) == (0.5, 0.52)
    assert near_bounds([0.5]) == (0.5, 0.5)
