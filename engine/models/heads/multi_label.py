"""Any number of several labels: a logit for each, binary cross entropy, F1."""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from ...data.task_batch import Labels
from .base import HeadSettings, LinearHead
from .metrics import METRICS
from .pair_features import SIMILARITIES
from .sentence import FEATURES, SentenceHead


class MultiLabelHead(SentenceHead):
    """Scores are logits ``[n, L]``, yes above 0; labels are 0 or 1, ``[n, L]``."""

    known_features = tuple(name for name in FEATURES if name not in SIMILARITIES)
    known_losses = ("default", "cross_entropy")
    needs_classes = True
    metrics = tuple(
        METRICS[name] for name in ("f1_micro", "f1_macro", "average_precision", "accuracy")
    )
    answers = "labels"
    answers_text = "`labels`, a logit for each, yes above 0"
    answers_code = MappingProxyType({"labels": "(x > 0).nonzero()[:, -1]"})

    def __init__(self, settings: HeadSettings) -> None:
        assert settings.task is not None
        super().__init__(settings, outputs=int(settings.task.high) + 1)

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean binary cross entropy over examples and labels."""
        return F.binary_cross_entropy_with_logits(scores, self.given(labels, scores))

    def predict(self, scores: Tensor) -> Tensor:
        """Return 0 or 1 for each label, int64 ``[n, L]``."""
        return (scores > 0).long()

    def certainty(self, scores: Tensor) -> Tensor:
        """Return the probability of the least certain of an example's answers."""
        return scores.abs().sigmoid().amin(1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return those of each label."""
        return scores.sigmoid()

    def as_linear(self) -> LinearHead | None:
        """Return the output layer."""
        return self._linear("multi_label_classification")
