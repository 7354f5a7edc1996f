"""A number in a range: squared error or cross entropy of a share, Pearson correlation."""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from ...data.task_batch import Labels
from ...utils.errors import InputError
from ..pooling import TaskStates
from .base import HeadSettings, LinearHead
from .metrics import METRICS
from .pair_features import JOINT_WIDTHS, SIMILARITIES
from .sentence import SentenceHead


class RegressionHead(SentenceHead):
    """Scores are values ``[n]``, or by cross entropy the logits ``[n]`` of shares of the range.

    A similarity is a share of the range itself; it has no output layer.
    """

    known_losses = ("default", "mse", "cross_entropy")
    metrics = tuple(METRICS[name] for name in ("pearson", "spearman", "mse"))
    answers_text = (
        "`score`; `share_logit`, the logit of a share of the range; or, of a similarity without an "
        "output layer, `share`, that share itself"
    )
    answers_code = MappingProxyType(
        {
            "score": "x.clamp(low, low + span)",
            "share": "(low + span * x).clamp(low, low + span)",
            "share_logit": "low + span * x.sigmoid()",
        }
    )

    def __init__(self, settings: HeadSettings) -> None:
        assert settings.task is not None
        super().__init__(settings, outputs=1)
        self.low, self.high = settings.task.low, settings.task.high
        self.squared_error = settings.loss != "cross_entropy"
        self.answers = "score" if self.squared_error else "share_logit"
        if self.output is None:
            self.answers = "share"

    @classmethod
    def check(cls, settings: HeadSettings) -> None:
        """Refuse the cross entropy of what has no output layer, besides.

        Raises:
            InputError: the message names the recipe's key.
        """
        super().check(settings)
        if settings.loss == "cross_entropy" and settings.features in SIMILARITIES:
            raise InputError(
                f"tasks.{settings.name}.loss = 'cross_entropy': {settings.features} has no output "
                f"layer to train by it; take a head with one ({', '.join(JOINT_WIDTHS)})"
            )

    def forward(self, states: TaskStates) -> Tensor:
        """Return values or logits, ``[n]``."""
        scores = super().forward(states).squeeze(1)
        return self._of_share(scores) if self.output is None else scores

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean squared error, or the mean cross entropy of the labels' shares."""
        values = self.given(labels, scores)
        if self.squared_error:
            return F.mse_loss(scores, values)
        return F.binary_cross_entropy_with_logits(
            scores, (values - self.low) / (self.high - self.low)
        )

    def predict(self, scores: Tensor) -> Tensor:
        """Return values within the range."""
        if self.squared_error:
            return scores.clamp(self.low, self.high)
        return self._of_share(scores.sigmoid())

    def as_linear(self) -> LinearHead | None:
        """Return the output layer, whose values are not cut to the range."""
        return self._linear("regression", None if self.squared_error else (self.low, self.high))

    def _of_share(self, share: Tensor) -> Tensor:
        """Return the value that lies at a share of the range."""
        return self.low + (self.high - self.low) * share
