"""Yes or no: one logit, binary cross entropy, accuracy."""

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.task_batch import Labels
from ..layers import Linear
from ..pooling import TaskStates
from .base import HeadSettings, LinearHead
from .metrics import METRICS
from .pair_features import SIMILARITIES
from .sentence import SentenceHead

_SCALE_OF_SIMILARITY = 5.0
"""Of the logit that is read off a similarity, as training begins; the threshold is at 1/2."""


class BinaryHead(SentenceHead):
    """Scores are logits ``[n]``, yes above 0; labels are 0 or 1.

    A similarity gets a learnt scale and threshold.
    """

    known_losses = ("default", "cross_entropy")
    needs_classes = True
    metrics = tuple(
        METRICS[name]
        for name in ("accuracy", "f1", "f1_macro", "f1_micro", "matthews", "average_precision")
    )
    weighs_classes = True
    answers = "binary"
    answers_text = "`binary`, one logit, yes above 0"
    answers_code = MappingProxyType({"binary": "(x > 0).long()"})

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings, outputs=1)
        if settings.features in SIMILARITIES:
            self.output = Linear(1, 1)
            nn.init.constant_(self.output.weight, _SCALE_OF_SIMILARITY)
            nn.init.constant_(self.output.bias, -_SCALE_OF_SIMILARITY / 2)

    def forward(self, states: TaskStates) -> Tensor:
        """Return the logits ``[n]``."""
        return super().forward(states).squeeze(1)

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean binary cross entropy, or that of its ``class_loss``."""
        wanted = self.given(labels, scores)
        if self.class_loss is not None and not self.class_loss.is_plain:
            log_probs = F.logsigmoid(torch.stack([-scores, scores], dim=1))
            loss: Tensor = self.class_loss(log_probs, wanted.long())
            return loss
        return F.binary_cross_entropy_with_logits(scores, wanted)

    def predict(self, scores: Tensor) -> Tensor:
        """Return 0 or 1, int64."""
        return (scores > 0).long()

    def certainty(self, scores: Tensor) -> Tensor:
        """Return the probability of each answer."""
        return scores.abs().sigmoid()

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return those of no and yes, ``[n, 2]``."""
        return torch.stack([(-scores).sigmoid(), scores.sigmoid()], 1)

    def as_linear(self) -> LinearHead | None:
        """Return the output layer with a logit for each class: 0, and that of yes."""
        linear = self._linear("single_label_classification")
        if linear is None:
            return None
        weight, bias = (torch.cat([torch.zeros_like(x), x]) for x in linear[:2])
        return linear._replace(weight=weight, bias=bias)
