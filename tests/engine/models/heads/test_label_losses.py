"""Losses of tags and of several labels against classes of unequal size."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.split import TokenizedSplit
from engine.data.task_batch import TaggedTokens
from engine.models.heads import ClassLossSettings
from engine.utils.errors import InputError

from ....kernels.tolerance import assert_within_twice
from ...small_models import random_split
from .cases import head_of
from .test_determinism import Listing
from .test_multi_label import TOPICS
from .test_tags import TAGS, split_of

TAG_COUNTS = [90, 6, 4]
LABEL_COUNTS = [[12, 8], [19, 1], [10, 10], [3, 17]]
"""Of 20 examples: without and with each of the four topics."""
WEIGHTS = {"ner": (0.5, 3.0, 8.0), "topics": (1.5, 19.0, 1.0, 0.25)}
SETTINGS = [
    ("balanced", 0.0, 0.0),
    ("given", 0.0, 0.0),
    ("given", 0.1, 0.0),
    ((), 0.0, 2.0),
    ("balanced", 0.1, 1.5),
]


def head_with(task: str, weights, smoothing: float = 0.0, gamma: float = 0.0):
    weights = WEIGHTS[task] if weights == "given" else weights
    settings = ClassLossSettings(weights, smoothing, gamma)
    form, features = (TAGS, "tokens") if task == "ner" else (TOPICS, "single")
    head = head_of(form, features, class_loss=settings)
    head.class_loss.weigh(TAG_COUNTS if task == "ner" else LABEL_COUNTS)
    return head


def drawn(task: str, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor | TaggedTokens]:
    """Twelve tags of which three do not count; 20 examples of four labels, fp32."""
    torch.manual_seed(seed)
    if task == "ner":
        targets = torch.tensor([0, 0, -100, 1, 0, 2, 0, -100, 0, 1, 0, -100])
        return scale * torch.randn(12, 3), TaggedTokens(targets, targets)
    labels = torch.zeros(20, 4)
    for label, (_, yes) in enumerate(LABEL_COUNTS):
        labels[torch.randperm(20)[:yes], label] = 1
    return scale * torch.randn(20, 4), labels


def of_tags(scores: Tensor, labels: TaggedTokens, head) -> Tensor:
    """The formula, of those tags that count, with one-hot labels."""
    weights, smoothing, gamma = head.class_loss.weights, *head.class_loss.settings[1:]
    weights = torch.ones(3) if weights is None else weights
    counting = labels.targets >= 0
    log_p = scores[counting].log_softmax(1)
    q = F.one_hot(labels.targets[counting], 3).to(log_p.dtype)
    q = (1 - smoothing) * q + smoothing / 3
    each = q * weights.to(log_p.dtype) * (-log_p.expm1()) ** gamma * -log_p
    return each.sum(1).mean()


def of_labels(scores: Tensor, labels: Tensor, head) -> Tensor:
    """The formula, of yes and no apart."""
    weights, smoothing, gamma = head.class_loss.weights, *head.class_loss.settings[1:]
    weights = torch.ones(4, 2) if weights is None else weights
    no, yes = weights.to(scores.dtype).unbind(1)
    q = (1 - smoothing) * labels.to(scores.dtype) + smoothing / 2
    log_p, log_not = F.logsigmoid(scores), F.logsigmoid(-scores)
    positive = q * yes * (-log_p.expm1()) ** gamma * -log_p
    negative = (1 - q) * no * (-log_not.expm1()) ** gamma * -log_not
    return (positive + negative).mean()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("task", "plain"), [("ner", of_tags), ("topics", of_labels)])
def test_loss_and_gradient_are_those_of_the_formula(task, plain, settings):
    head, found = head_with(task, *settings), []
    own = lambda scores, labels, _: head.loss(scores, labels)  # noqa: E731
    for loss, dtype in ((own, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        values, gradients = [], []
        for seed in range(32):  # the error of a single sum is chance
            scores, labels = drawn(task, seed=seed)
            inputs = scores.to(dtype).requires_grad_()
            values.append(loss(inputs, labels, head))
            gradients += torch.autograd.grad(values[-1], inputs)
        found.append((torch.stack(values).detach(), torch.stack(gradients)))
    for ours, torchs, exact in zip(*found, strict=True):
        assert_within_twice(ours, torchs, exact)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_tags_without_focal_loss_have_torchs_cross_entropy(smoothing):
    head, (scores, labels) = head_with("ner", "given", smoothing), drawn("ner")
    exact = F.cross_entropy(
        scores.double(),
        labels.targets,
        weight=head.class_loss.weights.double(),
        ignore_index=-100,
        label_smoothing=smoothing,
        reduction="sum",
    )
    found = head.loss(scores.double(), labels)
    assert found.item() == pytest.approx(exact.item() / 9, rel=1e-12)


@pytest.mark.parametrize("weights", ["given", "balanced"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_labels_without_focal_loss_have_torchs_cross_entropy(weights, smoothing):
    """With ``pos_weight``, over the mean weight of all terms of the training examples."""
    head, (scores, labels) = head_with("topics", weights, smoothing), drawn("topics")
    counts = torch.tensor(LABEL_COUNTS).double()
    given = torch.tensor(WEIGHTS["topics"]).double()
    ratio = given if weights == "given" else counts[:, 0] / counts[:, 1]
    exact = F.binary_cross_entropy_with_logits(
        scores.double(), (1 - smoothing) * labels.double() + smoothing / 2, pos_weight=ratio
    )
    mean = (counts[:, 0] + ratio * counts[:, 1]).sum() / counts.sum()
    found = head.loss(scores.double(), labels).item()
    rounding = torch.finfo(torch.float32).eps  # of the weights
    assert found == pytest.approx((exact / mean).item(), rel=rounding)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_labels_have_the_sigmoid_focal_loss(gamma):
    """As torchvision computes it, without alpha: by p_t, the probability of what is the case."""
    head, (scores, labels) = head_with("topics", (), 0.0, gamma), drawn("topics")
    logits, targets = scores.double(), labels.double()
    p = logits.sigmoid()
    p_t = p * targets + (1 - p) * (1 - targets)
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    exact = (entropy * (1 - p_t) ** gamma).mean()
    assert head.loss(logits, labels).item() == pytest.approx(exact.item(), rel=1e-12)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("task", WEIGHTS)
def test_a_batch_has_the_mean_of_its_parts(task, settings):
    """Weighed by the terms of each: nine tags of which one part has none, examples."""
    head, (scores, labels) = head_with(task, *settings), drawn(task)
    scores, total, count = scores.double(), 0.0, 0
    for part in (slice(0, 2), slice(2, 3), slice(3, 9), slice(9, None)):
        own = TaggedTokens(*(x[part] for x in labels)) if task == "ner" else labels[part]
        terms = int((own.targets >= 0).sum()) if task == "ner" else len(own)
        total, count = total + terms * head.loss(scores[part], own).item(), count + terms
    assert total / count == pytest.approx(head.loss(scores, labels).item(), rel=1e-12)


def test_no_tag_that_counts_has_the_loss_0():
    head = head_with("ner", "given", 0.1, 2.0)
    none = torch.full((5,), -100)
    scores = torch.randn(5, 3, requires_grad=True)
    loss = head.loss(scores, TaggedTokens(none, none))
    loss.backward()
    assert loss == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("task", WEIGHTS)
def test_gradients_do_not_depend_on_the_order_of_sums(task):
    """Operators that torch calls deterministic on a GPU."""
    head, (scores, labels) = head_with(task, "given", 0.1, 2.0), drawn(task)
    with Listing() as listing:
        head.loss(scores.requires_grad_(), labels).backward()
    assert not listing.found


def test_weights_have_the_mean_1_over_what_is_trained_on():
    tags, labels = head_with("ner", "balanced").class_loss, head_with("topics", "given").class_loss
    counts = torch.tensor(TAG_COUNTS).double()
    torch.testing.assert_close(tags.weights, (100 / (3 * counts)).float())
    counts = torch.tensor(LABEL_COUNTS).double()
    mean = (labels.weights * counts).sum() / counts.sum()
    assert mean.item() == pytest.approx(1, rel=1e-6)
    ratios = labels.weights[:, 1] / labels.weights[:, 0]
    torch.testing.assert_close(ratios, torch.tensor(WEIGHTS["topics"]))


def test_weights_of_1_are_the_loss_without():
    assert head_with("topics", (1.0, 1.0, 1.0, 1.0)).class_loss.is_plain
    assert not head_with("topics", (2.0, 2.0, 2.0, 2.0)).class_loss.is_plain
    assert head_with("ner", (2.0, 2.0, 2.0)).class_loss.is_plain


def several(labels: list[list[int]]) -> TokenizedSplit:
    split = random_split("sst", len(labels), vocab=9, seed=0)
    return dataclasses.replace(split, task="topics", labels=np.array(labels, np.float32))


def test_several_labels_are_counted_in_the_chosen_examples():
    split = several([[1, 0, 0], [0, 0, 1], [1, 1, 0], [1, 0, 0]])
    assert split.label_counts(np.array([0, 1, 3]), 3).tolist() == [[1, 2], [3, 0], [2, 1]]


@pytest.mark.parametrize("all_pieces", [False, True])
def test_tags_are_counted_in_the_terms_of_the_loss(all_pieces: bool):
    split = split_of(24, all_pieces=all_pieces)
    chosen = np.array([0, 3, 4, 20])
    labels = split.task_batch(chosen, 0).labels
    expected = torch.bincount(labels.targets[labels.targets >= 0], minlength=4)
    assert split.label_counts(chosen, 4).tolist() == expected.tolist()
    assert expected.sum() == split.terms(chosen)


@pytest.mark.parametrize(
    ("task", "counts", "message"),
    [
        ("ner", [5, 0, 2], "no tag that is trained on is B-X; give a weight for each class"),
        ("topics", [[5, 1], [6, 0], [0, 6], [3, 3]], "no training example has label b; give a wei"),
        ("topics", [[5, 1], [0, 6], [6, 0], [3, 3]], "every training example has label b; give a"),
    ],
)
def test_what_cannot_be_balanced_is_refused(task, counts, message):
    with pytest.raises(InputError, match=f"tasks.{task}.class_weights = 'balanced': {message}"):
        head_with(task, "balanced").class_loss.weigh(counts)


@pytest.mark.parametrize(("task", "what"), [("ner", "3 classes"), ("topics", "4 labels")])
def test_another_number_of_weights_is_refused(task, what):
    with pytest.raises(InputError, match=f"class_weights: 2 given, the task has {what}"):
        head_with(task, (1.0, 2.0))
