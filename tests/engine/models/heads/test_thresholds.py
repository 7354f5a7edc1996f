"""Thresholds: the best of all, by trying each with scikit-learn's metrics."""

import itertools

import numpy as np
import pytest
import torch

from engine.models.heads.metrics import METRICS
from engine.models.heads.thresholds import DEV, DEV_PER_LABEL, choose_thresholds, deciding_metric

from .cases import WIDTH, head_of, results

OF_ONE = ("accuracy", "f1", "f1_macro", "f1_micro", "matthews")
OF_SEVERAL = ("f1_micro", "f1_macro", "accuracy")


def score(metric: str, scores, labels, thresholds) -> float:
    answers = scores > np.float32(thresholds)
    return METRICS[metric].function(results(answers, labels))


def candidates(scores) -> list[float]:
    values = np.unique(scores)
    inner = (values[:-1] + values[1:]) / 2
    return [0.0, values[0] - 1, *inner.tolist(), values[-1] + 1]


def drawn(seed: int, shape: tuple[int, ...], share: float = 0.3, grid: int = 0):
    """Scores that have to do with the labels; on a grid of so many values many are equal."""
    draw = np.random.default_rng(seed)
    labels = (draw.random(shape) < share).astype(np.float32)
    scores = draw.normal(size=shape) + labels - 1.5
    if grid:
        scores = np.round(scores * grid) / grid
    return scores.astype(np.float32), labels


@pytest.mark.parametrize("grid", [0, 2])
@pytest.mark.parametrize("metric", OF_ONE)
@pytest.mark.parametrize("seed", range(3))
def test_of_yes_or_no_none_is_better(metric, seed, grid):
    scores, labels = drawn(seed, (23,), grid=grid)
    (found,) = choose_thresholds(scores, labels, metric)
    tried = {cut: score(metric, scores, labels, cut) for cut in candidates(scores)}
    best = max(tried.values())
    assert score(metric, scores, labels, found) == pytest.approx(best, abs=1e-12)
    nearest = min(abs(cut) for cut, value in tried.items() if value > best - 1e-9)
    assert abs(found) == pytest.approx(nearest, rel=1e-6)


@pytest.mark.parametrize("grid", [0, 2])
@pytest.mark.parametrize("metric", OF_SEVERAL)
@pytest.mark.parametrize("seed", range(3))
def test_for_all_labels_together_none_is_better(metric, seed, grid):
    scores, labels = drawn(seed, (11, 3), share=(0.1, 0.3, 0.8)[seed % 3], grid=grid)
    (found,) = choose_thresholds(scores, labels, metric)
    tried = {cut: score(metric, scores, labels, cut) for cut in candidates(scores)}
    best = max(tried.values())
    assert score(metric, scores, labels, found) == pytest.approx(best, abs=1e-12)
    nearest = min(abs(cut) for cut, value in tried.items() if value > best - 1e-9)
    assert abs(found) == pytest.approx(nearest, rel=1e-6)


@pytest.mark.parametrize("metric", ["f1_micro", "f1_macro"])
@pytest.mark.parametrize("seed", range(2))
def test_for_each_label_no_combination_is_better(metric, seed):
    scores, labels = drawn(seed, (6, 3), share=0.4)
    found = choose_thresholds(scores, labels, metric, per_label=True)
    assert found.shape == (3,)
    tried = itertools.product(*(candidates(own) for own in scores.T))
    best = max(score(metric, scores, labels, cuts) for cuts in tried)
    assert score(metric, scores, labels, found) == pytest.approx(best, abs=1e-12)


def test_for_each_label_it_is_as_good_as_one_for_all():
    scores, labels = drawn(5, (400, 7), share=0.2)
    scores += np.linspace(-2, 2, 7, dtype=np.float32)
    for metric in ("f1_micro", "f1_macro"):
        one, each = (
            choose_thresholds(scores, labels, metric, per_label=per_label)
            for per_label in (False, True)
        )
        half, of_one, of_each = (score(metric, scores, labels, x) for x in (0, one, each))
        assert half < of_one < of_each


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
@pytest.mark.parametrize("scores", [[2, 2, 2, 2], [-3, -1, 1, 3], [0, 0, -1, -1]])
@pytest.mark.parametrize("metric", OF_ONE)
def test_labels_and_scores_may_be_the_same(metric, scores, labels):
    scores, labels = np.float32(scores), np.float32(labels)
    (found,) = choose_thresholds(scores, labels, metric)
    best = max(score(metric, scores, labels, cut) for cut in candidates(scores))
    assert score(metric, scores, labels, found) == pytest.approx(best, abs=1e-12)


def test_equally_good_ones_leave_it_at_a_half():
    scores = np.float32([-2, -1, 1, 2])
    assert choose_thresholds(scores, np.float32([0, 0, 1, 1]), "f1").tolist() == [0]
    apart = np.float32([[-2, 5], [-1, 6], [1, 7], [2, 8]])
    labels = np.float32([[0, 0], [0, 0], [1, 1], [1, 1]])
    found = choose_thresholds(apart, labels, "f1_macro", per_label=True)
    assert found.tolist() == [0, 6.5]
    # F1 of a label that no example has is 0 whatever is answered.
    labels[:, 1] = 0
    found = choose_thresholds(apart, labels, "f1_macro", per_label=True)
    assert found.tolist() == [0, 0]


@pytest.mark.parametrize("base", [1.0, -3.0e4, 1e30])
def test_neighbours_in_fp32_are_told_apart(base):
    """Their mean rounds to one of them, and the threshold must not be the upper one."""
    values = [np.float32(base)]
    for _ in range(3):
        values.append(np.nextafter(values[-1], np.float32(np.inf)))
    scores = np.array(values, np.float32)
    for right in range(1, 4):
        labels = (np.arange(4) >= right).astype(np.float32)
        (found,) = choose_thresholds(scores, labels, "accuracy")
        assert ((scores > found) == (labels > 0)).all()
    below, above = (choose_thresholds(scores, np.full(4, x, np.float32), "f1") for x in (1, 0))
    assert (scores > below).all()
    assert np.isfinite(above).all()


def test_the_first_metric_that_depends_on_it_decides():
    assert deciding_metric(DEV, ["average_precision", "f1"], several=False) == "f1"
    assert deciding_metric(DEV, ["accuracy", "f1_micro"], several=True) == "accuracy"
    for threshold, names, several, message in (
        (DEV, ["average_precision"], False, "average_precision is the same for each; name one of"),
        (DEV_PER_LABEL, ["accuracy", "f1_micro"], True, "accuracy cannot choose it; name one of f"),
        (DEV, ["within_one"], False, "within_one cannot choose it; name one of accuracy, f1, f1_m"),
    ):
        with pytest.raises(ValueError, match=message):
            deciding_metric(threshold, names, several=several)


@pytest.mark.parametrize("task", ["quora", "aspects"])
def test_a_linear_layer_of_an_export_answers_yes_above_zero(task):
    """Pipelines know no threshold, so that it is in the bias."""
    head = head_of(task, "cross" if task == "quora" else "single")
    head.set_thresholds([0.3])
    vectors = torch.randn(40, WIDTH)
    linear = head.as_linear()
    logits = vectors @ linear.weight.t() + linear.bias
    yes = logits.argmax(1) if task == "quora" else (logits > 0).long()
    with torch.no_grad():
        scores = head.output(vectors)
    scores = scores.squeeze(1) if task == "quora" else scores
    assert (scores.abs() < 0.3).any()
    assert torch.equal(yes, head.predict(scores))
