"""Scores: values by squared error, shares of their range by cross entropy."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.data.task_schema import TaskSchema
from engine.models.heads.pair_features import SIMILARITIES
from engine.utils.errors import InputError

from .cases import WIDTH, head_of, results, within_twice


@pytest.mark.parametrize("features", ["difference", "cosine"])
@pytest.mark.parametrize("loss", ["default", "mse"])
def test_by_default_the_loss_is_the_squared_error(features, loss):
    head = head_of("sts", features, loss)
    scores, labels = torch.tensor([-1.0, 2.6, 6.0]), torch.tensor([0.0, 2.2, 5.0])
    exact = (scores.double() - labels.double()).square().mean()
    assert within_twice(head.loss(scores, labels), F.mse_loss(scores, labels), exact)
    assert head.predict(scores).tolist() == pytest.approx([0, 2.6, 5])
    assert head.certainty(scores).tolist() == [1, 1, 1]


def test_by_cross_entropy_a_score_is_a_share_of_its_range():
    head = head_of("sts", "difference", "cross_entropy")
    logits, labels = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.0, 2.2, 5.0])
    p, share = logits.double().sigmoid(), labels.double() / 5
    exact = -(share * p.log() + (1 - share) * (1 - p).log()).mean()
    plain = F.binary_cross_entropy_with_logits(logits, labels / 5)
    assert within_twice(head.loss(logits, labels), plain, exact)
    assert within_twice(head.predict(logits), 5 * logits.sigmoid(), 5 * p)


def test_predictions_keep_to_a_range_that_floats_cannot_add_up_to():
    form = TaskSchema(task="t", sentences=("a",), label="b", kind="score", low=-0.9, high=-0.2)
    assert form.low + (form.high - form.low) != form.high
    found = head_of(form, "single").predict(torch.tensor([-9.0, 9.0], dtype=torch.float64))
    assert found.tolist() == [-0.9, -0.2]


@pytest.mark.parametrize("features", SIMILARITIES)
def test_a_similarity_has_no_output_layer_to_train_by_cross_entropy(features):
    with pytest.raises(InputError, match=f"{features} has no output layer"):
        head_of("sts", features, "cross_entropy")
    layout, tensors = head_of("sts", features).exported()
    assert (layout["answers"], tensors) == ("share", {})


def test_an_export_says_what_its_last_numbers_are():
    answers = {
        loss: head_of("sts", "mean", loss).exported() for loss in ("default", "cross_entropy")
    }
    assert [found.layout["answers"] for found in answers.values()] == ["score", "share_logit"]
    assert answers["default"].tensors["output.weight"].shape == (1, WIDTH)


def test_the_metric_is_the_correlation():
    head = head_of("sts", "mean")
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(2, 50))
    centred = x - x.mean(), y - y.mean()
    expected = centred[0] @ centred[1] / np.sqrt((centred[0] @ centred[0]) * (y - y.mean()) @ y)
    metric = head.metrics[0]
    assert metric.name == "pearson"
    assert metric.function(results(x, y)) == pytest.approx(expected, rel=1e-12)
    assert metric.function(results(np.ones(3), np.arange(3.0))) == 0
