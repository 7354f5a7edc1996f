"""Yes or no: one logit, yes above 0."""

import pytest
import torch
from torch.nn import functional as F

from engine.models.heads import ClassLossSettings, SimilaritySettings
from engine.models.heads.pair_features import SIMILARITIES
from engine.models.heads.similarity_loss import contrastive_loss
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


@pytest.mark.parametrize("margin", [0.5, 1.3])
@pytest.mark.parametrize("features", SIMILARITIES)
def test_contrastive_loss_is_of_the_distance_and_yes_within_half_of_the_margin(features, margin):
    settings = SimilaritySettings(margin=margin)
    head = head_of("quora", features, "contrastive", similarity=settings)
    assert not list(head.parameters())
    pooled, labels = torch.randn(2 * EXAMPLES, WIDTH), torch.tensor([1.0, 0, 0, 1, 1])
    scores = head(states_of(pooled))
    similarities = SIMILARITIES[features](*pooled.chunk(2))
    distances = 1 - SIMILARITIES[features](*pooled.double().chunk(2))
    exact = contrastive_loss(distances, labels.double(), margin)
    plain = contrastive_loss(1 - similarities, labels, margin)
    # A scale and its inverse: two roundings more of numbers up to 10.
    assert head.loss(scores, labels).item() == pytest.approx(exact.item(), rel=1e-5)
    assert plain.item() == pytest.approx(exact.item(), rel=1e-5)
    assert torch.equal(head.predict(scores), (distances < margin / 2).long())
    head.set_thresholds([0.25])
    (threshold,) = head.exported().layout["threshold"]
    assert torch.equal(head.predict(scores), (similarities > threshold).long())


def test_a_contrastive_loss_needs_a_similarity_and_has_no_classes():
    with pytest.raises(InputError, match="'contrastive': compares similarities, which mean has"):
        head_of("quora", "mean", "contrastive")
    with pytest.raises(InputError, match=r"tasks.quora.focal_gamma: has no effect on loss = 'con"):
        head_of("quora", "cosine", "contrastive", ClassLossSettings(focal_gamma=2.0))
    with pytest.raises(InputError, match="'contrastive': a head for score is trained by"):
        head_of("sts", "cosine", "contrastive")
