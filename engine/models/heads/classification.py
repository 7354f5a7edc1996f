"""One of several classes: a logit for each, cross entropy, accuracy."""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from ...data.task_batch import Labels
from .base import HeadSettings, LinearHead
from .metrics import METRICS
from .pair_features import SIMILARITIES
from .sentence import FEATURES, SentenceHead


class ClassificationHead(SentenceHead):
    """Scores are logits ``[n, classes]``; labels are class numbers.

    A similarity is one number, so that it cannot tell several classes apart.
    """

    known_features = tuple(name for name in FEATURES if name not in SIMILARITIES)
    known_losses = ("default", "cross_entropy")
    needs_classes = True
    metrics = tuple(
        METRICS[name]
        for name in ("accuracy", "f1_macro", "f1_micro", "matthews", "average_precision")
    )
    weighs_classes = True
    answers = "classes"
    answers_text = "`classes`, their logits"
    answers_code = MappingProxyType({"classes": "x.argmax()"})

    def __init__(self, settings: HeadSettings) -> None:
        assert settings.task is not None
        super().__init__(settings, outputs=int(settings.task.high) + 1)

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean cross entropy, or that of its ``class_loss``."""
        wanted = self.given(labels, scores).long()
        if self.class_loss is not None and not self.class_loss.is_plain:
            loss: Tensor = self.class_loss(scores.log_softmax(1), wanted)
            return loss
        return F.cross_entropy(scores, wanted)

    def predict(self, scores: Tensor) -> Tensor:
        """Return the likeliest classes, int64."""
        return scores.argmax(1)

    def certainty(self, scores: Tensor) -> Tensor:
        """Return their probabilities."""
        return scores.softmax(1).amax(1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return those of all classes."""
        return scores.softmax(1)

    def as_linear(self) -> LinearHead | None:
        """Return the output layer."""
        return self._linear("single_label_classification")
