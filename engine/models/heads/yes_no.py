"""Base of the heads that answer yes above a threshold: one for the task, or one for each label."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .base import HeadExport, HeadSettings, LinearHead
from .sentence import SentenceHead
from .thresholds import DEV, DEV_PER_LABEL, HALF


class YesNoHead(SentenceHead):
    """A logit for each question, ``[n]`` or ``[n, L]``, yes above its threshold.

    Attributes:
        threshold: how the recipe wants it chosen, one of THRESHOLDS.
        thresholds: fp32 ``[1]``, of the logits, or ``[L]`` one for each label; 0, a probability of
            1/2, until others are chosen on the dev data.  They are no weights: the manifest of a
            checkpoint has them.
    """

    known_thresholds: ClassVar[tuple[str, ...]] = (HALF, DEV)
    thresholds: Tensor

    def __init__(self, settings: HeadSettings, outputs: int) -> None:
        super().__init__(settings, outputs)
        self.threshold = settings.threshold
        count = outputs if self.threshold == DEV_PER_LABEL else 1
        self.register_buffer("thresholds", torch.zeros(count), persistent=False)

    def set_thresholds(self, logits: Sequence[float]) -> None:
        """Set the thresholds.

        Raises:
            ValueError: they are not as many as the recipe's choice gives.
        """
        if len(logits) != len(self.thresholds):
            raise ValueError(f"{len(logits)} thresholds, expected {len(self.thresholds)}")
        self.thresholds = self.thresholds.new_tensor([*logits])

    def predict(self, scores: Tensor) -> Tensor:
        """Return 0 or 1, int64 in the shape of the scores."""
        return (scores > self.thresholds.to(scores.device)).long()

    def certainty(self, scores: Tensor) -> Tensor:
        """Return the probability ``[n]`` of each answer, of several labels the least one."""
        own = scores.where(self.predict(scores) > 0, -scores).sigmoid()
        return own if own.dim() == 1 else own.amin(1)

    def _linear(
        self, problem_type: str, share_of: tuple[float, float] | None = None
    ) -> LinearHead | None:
        """Return the output layer, its bias less the thresholds: yes is above 0, a half."""
        linear = super()._linear(problem_type, share_of)
        return None if linear is None else linear._replace(bias=linear.bias - self.thresholds.cpu())

    def exported(self) -> HeadExport | None:
        """Return its record in an export, with the thresholds."""
        found = super().exported()
        assert found is not None, "a task's head is exported"
        return found._replace(layout=found.layout | {"threshold": self.thresholds.tolist()})
