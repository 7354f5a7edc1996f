"""Yes or no: one logit, binary cross entropy or a contrastive loss, accuracy."""

from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.task_batch import Labels
from ...utils.errors import InputError
from ..layers import Linear
from ..pooling import TaskStates
from .base import HeadExport, HeadSettings, LinearHead
from .metrics import METRICS
from .pair_features import SIMILARITIES
from .similarity_loss import contrastive_loss
from .yes_no import YesNoHead

CONTRASTIVE = "contrastive"

_SCALE_OF_SIMILARITY = 5.0
"""Of the logit that is read off a similarity, as training begins; the threshold is at 1/2."""


class BinaryHead(YesNoHead):
    """Scores are logits ``[n]``, yes above the threshold; labels are 0 or 1.

    A similarity s gets a learnt scale and threshold.  With the loss ``contrastive`` both stay what
    they are: the scale, and the distance 1 - s of half the margin.
    """

    known_losses = ("default", "cross_entropy", CONTRASTIVE)
    needs_classes = True
    metrics = tuple(
        METRICS[name]
        for name in ("accuracy", "f1", "f1_macro", "f1_micro", "matthews", "average_precision")
    )
    weighs_classes = True
    answers = "binary"
    answers_text = "`binary`, one logit, yes above `threshold`"
    answers_code = MappingProxyType({"binary": "(x > 0).long()"})

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings, outputs=1)
        self.margin = settings.similarity.margin if settings.loss == CONTRASTIVE else 0.0
        if settings.features in SIMILARITIES and not self.margin:
            self.output = Linear(1, 1)
            nn.init.constant_(self.output.weight, _SCALE_OF_SIMILARITY)
            nn.init.constant_(self.output.bias, -_SCALE_OF_SIMILARITY / 2)

    @classmethod
    def check(cls, settings: HeadSettings) -> None:
        """Refuse the contrastive loss of what is no similarity, and class weights of it, besides.

        Raises:
            InputError: the message names the recipe's key.
        """
        super().check(settings)
        if settings.loss != CONTRASTIVE:
            return
        table = f"tasks.{settings.name}"
        if settings.features not in SIMILARITIES:
            raise InputError(
                f"{table}.loss = '{CONTRASTIVE}': compares similarities, which {settings.features} "
                f"has none of; take a head that is one ({', '.join(SIMILARITIES)})"
            )
        for name in settings.class_loss.given:
            raise InputError(
                f"{table}.{name}: has no effect on loss = '{CONTRASTIVE}'; leave it out"
            )

    def forward(self, states: TaskStates) -> Tensor:
        """Return the logits ``[n]``."""
        scores = super().forward(states).squeeze(1)
        if not self.margin:
            return scores
        return _SCALE_OF_SIMILARITY * (scores - (1 - self.margin / 2))

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean binary cross entropy, that of its ``class_loss``, or contrastive loss."""
        wanted = self.given(labels, scores)
        if self.margin:
            distances = self.margin / 2 - scores / _SCALE_OF_SIMILARITY
            return contrastive_loss(distances, wanted, self.margin)
        if self.class_loss is not None and not self.class_loss.is_plain:
            log_probs = F.logsigmoid(torch.stack([-scores, scores], dim=1))
            loss: Tensor = self.class_loss(log_probs, wanted.long())
            return loss
        return F.binary_cross_entropy_with_logits(scores, wanted)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return those of no and yes, ``[n, 2]``."""
        return torch.stack([(-scores).sigmoid(), scores.sigmoid()], 1)

    def exported(self) -> HeadExport | None:
        """Return its record in an export; without an output layer thresholds are similarities."""
        found = super().exported()
        if not self.margin or found is None:
            return found
        similarities = 1 - self.margin / 2 + self.thresholds / _SCALE_OF_SIMILARITY
        return found._replace(layout=found.layout | {"threshold": similarities.tolist()})

    def as_linear(self) -> LinearHead | None:
        """Return the output layer with a logit for each class: 0, and that of yes."""
        linear = self._linear("single_label_classification")
        if linear is None:
            return None
        weight, bias = (torch.cat([torch.zeros_like(x), x]) for x in linear[:2])
        return linear._replace(weight=weight, bias=bias)
