"""Classes: logits, cross entropy, the likeliest and its probability."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.models.heads.pair_features import SIMILARITIES
from engine.utils.errors import InputError

from .cases import (
    CLASSES_OF_PAIRS,
    EXAMPLES,
    WIDTH,
    head_of,
    of_output,
    results,
    states_of,
    within_twice,
)


def test_a_sentence_gets_a_logit_for_each_class():
    pooled = torch.randn(EXAMPLES, WIDTH)
    head = head_of("sst", "single")
    with torch.no_grad():
        found = head(states_of(pooled))
        plain = F.linear(pooled, head.output.weight, head.output.bias)
    exact = np.stack([of_output(head, u) for u in pooled.double().numpy()])
    assert found.shape == (EXAMPLES, 5)
    assert within_twice(found, plain, torch.from_numpy(exact))


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_the_loss_is_the_cross_entropy(scale):
    logits, labels = scale * torch.randn(7, 5), torch.tensor([0.0, 4, 2, 1, 3, 0, 4])
    exact = -logits.double().log_softmax(1)[torch.arange(7), labels.long()].mean()
    plain = F.cross_entropy(logits, labels.long())
    for loss in ("default", "cross_entropy"):
        assert within_twice(head_of("sst", "single", loss).loss(logits, labels), plain, exact)


def test_answers_are_the_likeliest_classes_and_their_probabilities():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.5]])
    head = head_of(CLASSES_OF_PAIRS, "concat")
    assert head.predict(logits).tolist() == [1, 2]
    exact = logits.double().softmax(1).amax(1)
    assert within_twice(head.certainty(logits), logits.softmax(1).amax(1), exact)
    assert head.metrics[0].name == "accuracy"
    answers, labels = np.array([1.0, 2, 0, 1]), np.array([1.0, 2, 2, 1])
    assert head.metrics[0].function(results(answers, labels)) == 0.75


@pytest.mark.parametrize("features", SIMILARITIES)
def test_a_similarity_tells_no_classes_apart(features):
    with pytest.raises(InputError, match=rf"tasks.nli.head = '{features}': expected mean or"):
        head_of(CLASSES_OF_PAIRS, features)


def test_features_and_losses_of_other_tasks_are_refused():
    with pytest.raises(InputError, match=r"tasks.sst.head = 'mean': expected single or bilstm"):
        head_of("sst", "mean")
    with pytest.raises(InputError, match="'mse': a head for classes is trained by default or"):
        head_of("sst", "single", "mse")


def test_a_task_cannot_be_trained_without_labels():
    with pytest.raises(ValueError, match="labels: none for task 'sst'"):
        head_of("sst", "single").loss(torch.randn(2, 5), None)


def test_an_export_holds_the_output_layer():
    layout, tensors = head_of("sst", "single").exported()
    assert layout == {"features": "single", "answers": "classes", "low": 0, "high": 4} | {
        "classes": ()
    }
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "output.weight": (5, WIDTH),
        "output.bias": (5,),
    }
