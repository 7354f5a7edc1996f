"""Yes or no: one logit, yes above 0."""

import pytest
import torch
from torch.nn import functional as F

from engine.models.heads.pair_features import SIMILARITIES
from engine.utils.errors import InputError

from .cases import EXAMPLES, WIDTH, head_of, states_of, within_twice


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_the_loss_is_the_binary_cross_entropy(scale):
    logits, labels = scale * torch.randn(7), torch.tensor([1.0, 0, 0, 1, 1, 0, 1])
    p = logits.double().sigmoid()
    exact = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    plain = F.binary_cross_entropy_with_logits(logits, labels)
    for loss in ("default", "cross_entropy"):
        assert within_twice(head_of("quora", "concat", loss).loss(logits, labels), plain, exact)


def test_answers_are_yes_above_0():
    logits = torch.tensor([-2.0, 0.0, 0.5])
    head = head_of("cfimdb", "single")
    assert head.predict(logits).tolist() == [0, 0, 1]
    exact = logits.double().abs().sigmoid()
    assert within_twice(head.certainty(logits), logits.abs().sigmoid(), exact)


@pytest.mark.parametrize("features", SIMILARITIES)
def test_a_similarity_begins_with_its_threshold_at_a_half(features):
    head = head_of("quora", features)
    assert head.output.weight.shape == (1, 1)
    assert (head.output.bias / head.output.weight).item() == -0.5
    with torch.no_grad():
        logits = head(states_of(torch.randn(2 * EXAMPLES, WIDTH)))
    assert logits.shape == (EXAMPLES,)
    assert head.exported().layout["answers"] == "binary"


def test_it_has_no_squared_error():
    with pytest.raises(InputError, match="'mse': a head for binary is trained by default or"):
        head_of("quora", "mean", "mse")
