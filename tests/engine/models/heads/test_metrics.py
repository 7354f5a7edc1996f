"""Metrics, by their formulas on small tables and at their edges."""

import numpy as np
import pytest

from engine.models.heads import METRICS
from engine.models.heads.ranking import RANKING_METRICS

from .cases import results

OF_TEXTS = {"entity_f1", "squad_f1", "exact_match", *RANKING_METRICS}
"""Those that are not of one answer an example: test_tags.py, test_ranking.py."""


def value(name: str, *arguments) -> float:
    return METRICS[name].function(results(*arguments))


def counts(predictions, labels, positive) -> tuple[int, int, int, int]:
    """True and false positives, false and true negatives."""
    p, y = np.asarray(predictions) == positive, np.asarray(labels) == positive
    return int((p & y).sum()), int((p & ~y).sum()), int((~p & y).sum()), int((~p & ~y).sum())


def f1(tp: int, fp: int, fn: int) -> float:
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0


def test_f1_of_classes_and_of_labels():
    draw = np.random.default_rng(0)
    predictions, labels = draw.integers(0, 3, (2, 60))
    of_classes = [counts(predictions, labels, c)[:3] for c in range(3)]
    assert value("f1_macro", predictions, labels) == pytest.approx(
        np.mean([f1(*own) for own in of_classes])
    )
    assert value("f1_micro", predictions, labels) == pytest.approx(
        f1(*np.sum(of_classes, axis=0).tolist())
    )
    predictions, labels = draw.integers(0, 2, (2, 60))
    assert value("f1", predictions, labels) == pytest.approx(
        f1(*counts(predictions, labels, 1)[:3])
    )
    predictions, labels = draw.integers(0, 2, (2, 40, 4))
    labels[:, 3] = predictions[:, 3] = 0  # a label that nobody has counts as 0
    of_labels = [counts(predictions[:, j], labels[:, j], 1)[:3] for j in range(4)]
    assert value("f1_macro", predictions, labels) == pytest.approx(
        np.mean([f1(*own) for own in of_labels])
    )
    assert value("f1_micro", predictions, labels) == pytest.approx(
        f1(*np.sum(of_labels, axis=0).tolist())
    )
    right = (predictions == labels).all(1).mean()
    assert value("accuracy", predictions, labels) == pytest.approx(right)


def test_matthews_is_the_correlation_of_yes_and_no():
    predictions, labels = np.random.default_rng(0).integers(0, 2, (2, 50))
    assert value("matthews", predictions, labels) == pytest.approx(
        np.corrcoef(predictions, labels)[0, 1]
    )


def test_correlations_and_errors_of_numbers():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 30))
    ranks = [np.argsort(np.argsort(z)) for z in (x, y)]
    assert value("spearman", x, y) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert value("mse", x, y) == pytest.approx(((x - y) ** 2).mean())
    assert METRICS["mse"].sign == -1
    assert {metric.sign for name, metric in METRICS.items() if name != "mse"} == {1}


def area(scores, labels) -> float:
    """Average precision by its definition, for scores without ties."""
    order = np.argsort(-np.asarray(scores))
    hits = np.asarray(labels)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum())


def test_average_precision_of_yes_of_classes_and_of_labels():
    draw = np.random.default_rng(0)
    yes = draw.random(40)
    labels = draw.integers(0, 2, 40)
    both = np.stack([1 - yes, yes], 1)
    assert value("average_precision", yes > 0.5, labels, both) == pytest.approx(area(yes, labels))
    shares = draw.dirichlet(np.ones(3), 40)
    labels = draw.integers(0, 2, 40)  # no example of class 2: it is left out
    expected = np.mean([area(shares[:, c], labels == c) for c in range(2)])
    assert value("average_precision", shares.argmax(1), labels, shares) == pytest.approx(expected)
    shares, labels = draw.random((40, 3)), draw.integers(0, 2, (40, 3))
    labels[:, 1] = 0
    expected = np.mean([area(shares[:, j], labels[:, j]) for j in (0, 2)])
    assert value("average_precision", shares > 0.5, labels, shares) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in OF_TEXTS])
@pytest.mark.parametrize("label", [0, 1])
def test_one_example_and_constant_answers_have_a_finite_score(name: str, label: int):
    for count in (1, 7):
        answers = np.full(count, label)
        shares = np.stack([1 - answers, answers], 1)
        score = value(name, answers, answers, shares)
        assert np.isfinite(score)
        wrong = value(name, 1 - answers, answers, 1 - shares)
        assert np.isfinite(wrong)
