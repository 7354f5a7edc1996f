"""Any number of several labels: a logit for each, binary cross entropy, F1."""

from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.task_batch import Labels
from .base import HeadSettings, LinearHead
from .metrics import METRICS
from .pair_features import SIMILARITIES
from .sentence import FEATURES
from .thresholds import THRESHOLDS
from .yes_no import YesNoHead


class MultiLabelHead(YesNoHead):
    """Scores are logits ``[n, L]``, yes above the threshold; labels are 0 or 1, ``[n, L]``."""

    known_features = tuple(name for name in FEATURES if name not in SIMILARITIES)
    known_losses = ("default", "cross_entropy")
    needs_classes = True
    metrics = tuple(
        METRICS[name] for name in ("f1_micro", "f1_macro", "average_precision", "accuracy")
    )
    weighs_classes = True
    known_thresholds = THRESHOLDS
    answers = "labels"
    answers_text = "`labels`, a logit for each, yes above `threshold`"
    answers_code = MappingProxyType({"labels": "(x > 0).nonzero()[:, -1]"})

    def __init__(self, settings: HeadSettings) -> None:
        assert settings.task is not None
        super().__init__(settings, outputs=int(settings.task.high) + 1)

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean binary cross entropy of all labels, or that of its ``class_loss``."""
        wanted = self.given(labels, scores)
        if self.class_loss is not None and not self.class_loss.is_plain:
            log_probs = F.logsigmoid(torch.stack([-scores, scores], dim=-1))
            loss: Tensor = self.class_loss(log_probs, wanted.long())
            return loss
        return F.binary_cross_entropy_with_logits(scores, wanted)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return those of each label."""
        return scores.sigmoid()

    def as_linear(self) -> LinearHead | None:
        """Return the output layer."""
        return self._linear("multi_label_classification")
