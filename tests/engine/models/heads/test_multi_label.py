"""Any number of several labels: the loss by its formula, answers, their probabilities."""

import pytest
import torch
from torch.nn import functional as F

from engine.data.task_schema import TaskSchema
from engine.utils.errors import InputError

from .cases import EXAMPLES, WIDTH, head_of, states_of, within_twice

TOPICS = TaskSchema(
    task="topics",
    sentences=("text",),
    label="topics",
    kind="multi_label",
    high=3,
    classes=("a", "b", "c", "d"),
    labels="several",
)
PAIRS = TaskSchema(
    task="pairs", sentences=("x", "y"), label="l", kind="multi_label", high=1, labels="several"
)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_loss_is_the_mean_binary_cross_entropy(scale):
    logits = scale * torch.randn(5, 4)
    labels = (torch.rand(5, 4) < 0.4).float()
    p = logits.double().sigmoid()
    exact = -(labels * p.log() + (1 - labels) * (-logits.double()).sigmoid().log()).mean()
    plain = F.binary_cross_entropy_with_logits(logits, labels)
    assert within_twice(head_of(TOPICS, "single").loss(logits, labels), plain, exact)


def test_answers_are_the_labels_above_0():
    head = head_of(TOPICS, "single")
    logits = torch.tensor([[0.5, -1.0, 0.0, 3.0], [-1.0, -2.0, -3.0, -4.0]])
    assert head.predict(logits).tolist() == [[1, 0, 0, 1], [0, 0, 0, 0]]
    exact = logits.double().sigmoid()
    assert within_twice(head.probabilities(logits), logits.sigmoid(), exact)
    least = torch.maximum(exact, 1 - exact).amin(1)
    assert within_twice(head.certainty(logits), logits.abs().sigmoid().amin(1), least)


def test_pairs_have_the_features_of_pairs():
    with torch.no_grad():
        scores = head_of(PAIRS, "difference")(states_of(torch.randn(2 * EXAMPLES, WIDTH)))
    assert scores.shape == (EXAMPLES, 2)
    with pytest.raises(InputError, match="expected mean or concat or distance or difference"):
        head_of(PAIRS, "cosine")
