"""Cross entropy against classes of unequal size."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.models.heads import ClassLossSettings
from engine.utils.errors import InputError

from ....kernels.tolerance import assert_within_twice
from .cases import head_of

COUNTS = {"sst": [3, 1, 4, 1, 5], "quora": [6, 2]}
SETTINGS = [
    ClassLossSettings(label_smoothing=0.1),
    ClassLossSettings("balanced"),
    ClassLossSettings("balanced", 0.3),
    ClassLossSettings(focal_gamma=2.0),
    ClassLossSettings("balanced", 0.1, 1.5),
]


def head_with(task: str, settings: ClassLossSettings):
    head = head_of(task, "single" if task == "sst" else "concat", class_loss=settings)
    head.class_loss.weigh(COUNTS[task])
    return head


def of_classes(scores: Tensor) -> Tensor:
    """The logits of all classes; one logit is that of yes, against 0."""
    return scores if scores.dim() == 2 else torch.stack([torch.zeros_like(scores), scores], dim=1)


def plain(scores: Tensor, labels: Tensor, weights: Tensor, settings: ClassLossSettings) -> Tensor:
    """The formula of the module, written down as it stands."""
    log_p = of_classes(scores).log_softmax(1)
    q = F.one_hot(labels.long(), len(weights)).to(log_p.dtype)
    q = (1 - settings.label_smoothing) * q + settings.label_smoothing / len(weights)
    # 1 - p by expm1: in fp32 the difference is 0 long before log p is, and its power has no slope.
    others = -log_p.expm1()
    each = q * weights.to(log_p.dtype) * others**settings.focal_gamma * -log_p
    return each.sum(1).mean()


def weights_of(head) -> Tensor:
    weights = head.class_loss.weights
    return torch.ones(len(COUNTS[head.name])) if weights is None else weights


def drawn(task: str, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    counts = COUNTS[task]
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    scores = scale * torch.randn(*((len(labels), 5) if task == "sst" else (len(labels),)))
    return scores, labels.float()


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        *((settings, scale) for settings in SETTINGS for scale in (1.0, 8.0)),
        # At p = 1, as with larger scores, the plain way has no gradient in fp32.
        (ClassLossSettings("balanced", 0.1, 0.5), 1.0),
    ],
)
@pytest.mark.parametrize("task", COUNTS)
def test_loss_and_gradient_are_those_of_the_formula(task, settings, scale):
    head = head_with(task, settings)
    found = []
    for loss, dtype in ((head.loss, torch.float32), (plain, torch.float32), (plain, torch.float64)):
        values, gradients = [], []
        for seed in range(32):  # the error of a single sum is chance
            scores, labels = drawn(task, scale, seed)
            inputs = scores.to(dtype).requires_grad_()
            more = () if loss == head.loss else (weights_of(head), settings)
            values.append(loss(inputs, labels, *more))
            gradients += torch.autograd.grad(values[-1], inputs)
        found.append((torch.stack(values).detach(), torch.stack(gradients)))
    for own, torchs, exact in zip(*found, strict=True):
        assert_within_twice(own, torchs, exact)


@pytest.mark.parametrize("settings", SETTINGS[:3])
@pytest.mark.parametrize("task", COUNTS)
def test_without_focal_loss_it_is_torchs_over_the_number_of_examples(task, settings):
    head = head_with(task, settings)
    scores, labels = drawn(task, 2.0)
    exact = F.cross_entropy(
        of_classes(scores.double()),
        labels.long(),
        weight=weights_of(head).double(),
        label_smoothing=settings.label_smoothing,
        reduction="sum",
    ) / len(labels)
    assert head.loss(scores.double(), labels).item() == pytest.approx(exact.item(), rel=1e-12)


def test_over_all_training_examples_it_is_torchs_weighted_mean():
    head = head_with("sst", ClassLossSettings((1.0, 2.0, 3.0, 4.0, 5.0)))
    scores, labels = drawn("sst", 1.0)
    scores, weight = scores.double(), torch.arange(1.0, 6.0).double()
    exact = F.cross_entropy(scores, labels.long(), weight=weight)
    rounding = torch.finfo(torch.float32).eps  # of the weights
    assert head.loss(scores, labels).item() == pytest.approx(exact.item(), rel=rounding)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_batch_has_the_mean_of_its_parts(settings):
    """As micro-batches and ranks need it, whatever labels each of them has."""
    head = head_with("sst", settings)
    scores, labels = drawn("sst", 1.0)
    scores = scores.double()
    parts = zip(scores.split(7), labels.split(7), strict=True)
    means = [head.loss(*part).item() for part in parts]
    assert sum(means) / 2 == pytest.approx(head.loss(scores, labels).item(), rel=1e-12)


def test_balanced_weights():
    """Those that compute_class_weight("balanced", ...) of scikit-learn gives: n / (C n_c)."""
    found = head_with("sst", ClassLossSettings("balanced")).class_loss.weights
    torch.testing.assert_close(found, torch.tensor([14 / 15, 14 / 5, 14 / 20, 14 / 5, 14 / 25]))
    even = head_of("quora", "concat", class_loss=ClassLossSettings("balanced"))
    even.class_loss.weigh([9, 9])
    assert even.class_loss.is_plain


@pytest.mark.parametrize("gamma", [0.25, 1.0, 5.0])
@pytest.mark.parametrize("task", COUNTS)
def test_of_certain_answers_the_focal_loss_has_finite_gradients(task, gamma):
    head = head_with(task, ClassLossSettings(focal_gamma=gamma))
    scores, labels = drawn(task, 1e6)
    scores.requires_grad_()
    loss = head.loss(scores, labels)
    loss.backward()
    assert math.isfinite(loss.item())
    assert scores.grad.isfinite().all()


def test_a_checkpoint_has_no_weights_of_classes():
    assert list(head_with("sst", SETTINGS[1]).state_dict()) == ["output.weight", "output.bias"]


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        ("sts", ClassLossSettings("balanced"), r"tasks.sts.class_weights = 'balanced': a head for"),
        ("sts", ClassLossSettings(focal_gamma=2.0), r"tasks.sts.focal_gamma = 2.0: a head for sco"),
        (
            "quora",
            ClassLossSettings((1.0, 2, 3)),
            "tasks.quora.class_weights: 3 given, the task ha",
        ),
    ],
)
def test_what_a_task_cannot_have_is_refused(task, settings, message):
    with pytest.raises(InputError, match=message):
        head_of(task, "concat", class_loss=settings)


def test_weights_that_the_training_examples_do_not_give_are_refused():
    head = head_of("quora", "concat", class_loss=ClassLossSettings("balanced"))
    with pytest.raises(InputError, match="no training example has class 1; give a weight for"):
        head.class_loss.weigh([5, 0])
    head = head_of("quora", "concat", class_loss=ClassLossSettings((1e-30, 1e30)))
    with pytest.raises(InputError, match="class_weights: too far apart for fp32"):
        head.class_loss.weigh([5, 0])
