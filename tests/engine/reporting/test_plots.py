"""Pictures take any names and any number of them, literally and without a warning."""

import base64
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from engine.data.task_schema import TaskSchema
from engine.reporting import plots
from engine.reporting.labels import label
from engine.reporting.mistakes import Findings, findings, heatmaps
from engine.reporting.plots import confusion_matrix, curves, extremes, heatmap, scatter
from engine.reporting.run_data import Answers, confusion, most_confused

AWKWARD = [
    *("$", "$a", "$a$", r"$\frac{1$", r"\$5", "a^b_c", "100 %", "{0}", "#1", "&amp;", "<b>", "~"),
    *("_", "_nolegend_", "__init__", "", " ", "\t", "a\nb", "\r\n", "\0", "\x1b[2J", "\u200b"),
    *("\u202eabc", "عربى", "עברית", "你好", "\U0001f600", "e\u0301", "\ufeff", "\u3000", "\ue000"),
    *("W" * 300, "True", "0", "None", "nan"),
]


def texts(picture: str) -> str:
    """The text of a picture that was drawn with its text as text."""
    svg = base64.b64decode(picture.partition(",")[2])
    return "\n".join("".join(t.itertext()) for t in ET.fromstring(svg).iter() if "text" in t.tag)


@pytest.fixture
def drawn_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(plots.STYLE, "svg.fonttype", "none")


def of_classes(classes: tuple[str, ...], labels: object, predictions: object) -> Answers:
    form = TaskSchema(
        task="t",
        sentences=("a",),
        label="b",
        kind="classes",
        high=len(classes) - 1,
        classes=classes,
    )
    given = (np.asarray(values, np.float32) for values in (labels, predictions))
    return Answers(form, "accuracy", 0.5, *given, [])


@pytest.mark.parametrize("name", AWKWARD, ids=ascii)
def test_a_label_is_short_visible_and_on_one_line(name):
    shown = label(name)
    assert 0 < len(shown) <= 28
    assert shown.strip()
    assert shown.isprintable()
    if re.fullmatch("[!-~]{1,20}", name):
        assert shown == name


def test_labels_stay_apart():
    assert len({label(name) for name in AWKWARD}) == len(AWKWARD)


@pytest.mark.usefixtures("drawn_as_text")
def test_every_picture_shows_names_as_they_are():
    points = (np.arange(3.0), np.arange(3.0))
    some, others, last = AWKWARD[:13], AWKWARD[13:26], AWKWARD[26:]
    shown = {
        curves(dict.fromkeys(some, points), "loss"): some,
        curves(dict.fromkeys(others, points), "loss", smooth=False, zero=True): others,
        heatmap(last, some[:2], np.zeros((len(last), 2)), signed=True): [*last, *some[:2]],
        confusion_matrix(of_classes(tuple(some), range(13), range(13))): some,
    }
    for picture, names in shown.items():
        assert [name for name in names if label(name) not in texts(picture)] == []


def test_heatmaps_of_tasks_of_any_name_and_number():
    found = findings(of_classes(("a", "b"), [0, 1], [0, 0]))
    assert len(heatmaps(dict.fromkeys(AWKWARD[:13], found))) < 1 << 20


def test_one_curve_needs_no_legend_and_none_no_points():
    nothing = (np.array([]), np.array([]))
    for named in ({}, {"_": nothing}, {"_": nothing, "b": nothing}):
        assert curves(named, "loss").startswith("data:image/svg+xml")


@pytest.mark.parametrize("count", [2, 24, 25, 3000])
def test_a_confusion_matrix_of_many_classes_is_small(count):
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(count, size=(2, 5000))
    answers = of_classes(tuple(f"class {n}" for n in range(count)), labels, predictions)
    picture = confusion_matrix(answers)
    assert len(picture) < 400_000
    shown = most_confused(answers, 24)
    assert len(shown) == min(count, 24)
    counts = confusion(answers, shown)
    assert counts.shape == ((count if count < 25 else 25),) * 2
    assert counts.sum() == 5000
    np.testing.assert_array_equal(counts[0].sum(), (labels == shown[0]).sum())
    np.testing.assert_array_equal(counts[:, 1].sum(), (predictions == shown[1]).sum())


def test_the_classes_that_are_confused_are_those_shown():
    labels = np.arange(100)
    predictions = labels.copy()
    predictions[[7, 50]] = [8, 99]
    answers = of_classes(tuple(map(str, range(100))), labels, predictions)
    np.testing.assert_array_equal(most_confused(answers, 24), [7, 8, 50, 99])
    counts = confusion(answers, most_confused(answers, 24))
    np.testing.assert_array_equal(counts.diagonal(), [0, 1, 0, 1, 96])
    assert (counts[0, 1], counts[2, 3]) == (1, 1)
    right = of_classes(tuple(map(str, range(100))), labels, labels)
    assert confusion_matrix(right).startswith("data:image/svg+xml")


def test_a_label_that_never_occurs_leaves_its_row_empty():
    answers = of_classes(("a", "b", "c"), [0, 0, 1], [0, 2, 1])
    assert confusion(answers)[2].sum() == 0
    assert confusion_matrix(answers).startswith("data:image/svg+xml")


def test_of_many_curves_the_lowest_and_highest_are_drawn():
    means = {f"{n}": float((n * 37) % 100) for n in range(100)}
    shown = extremes(means)
    assert len(shown) == 24
    assert {means[name] for name in shown} == {*range(12), *range(88, 100)}
    assert shown == [name for name in means if name in shown]
    assert extremes(dict.fromkeys("abc", 1.0)) == ["a", "b", "c"]


@pytest.mark.parametrize(("low", "high"), [(0, 5), (-1e38, 1e38), (0, 1e-30), (0.25, 0.75)])
def test_scores_of_any_range_have_pictures(low, high):
    form = TaskSchema(
        task="t", sentences=("a",), label="b", kind="score", low=low, high=high, classes=()
    )
    values = np.linspace(low, high, 9).astype(np.float32)
    answers = Answers(form, "accuracy", 1.0, values, values[::-1].copy(), [])
    assert scatter(answers).startswith("data:image/svg+xml")
    found = findings(answers)
    assert np.sum(found.counts) == 9
    heatmaps({"t": found})
    assert Findings.model_validate_json(found.model_dump_json()) == found
