"""A tag for each word of a text: a linear layer on token states, cross entropy, entity F1."""

from types import MappingProxyType

from torch import Tensor
from torch.nn import functional as F

from ..._kernels import kernels
from ...data.task_batch import Labels, TaggedTokens
from ...data.task_schema import TaskSchema
from ..layers import Linear
from ..pooling import TaskStates, at_least_fp32
from .base import Head, HeadSettings, LinearHead
from .metrics import METRICS, Metric

TOKENS = "tokens"
"""The features of a head that reads the states of tokens."""


class TagHead(Head):
    """Scores are logits ``[m, C]`` of the m tagged tokens; labels are :class:`TaggedTokens`.

    A word is scored by the state of its first token, as in BERT's own tagger (Devlin et al. 2019,
    section 5.3), or trained by all of them (``tasks.NAME.tag_pieces``).
    """

    known_features = (TOKENS,)
    known_losses = ("default", "cross_entropy")
    needs_classes = True
    metrics = tuple(METRICS[name] for name in ("accuracy", "entity_f1", "f1_macro", "f1_micro"))
    weighs_classes = True
    varies_in_size = True
    answers = "tags"
    answers_text = "`tags`, the logits of the tags of a word, from the state of its first token"
    answers_code = MappingProxyType({"tags": "x.argmax()"})
    reads_tokens = True

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings)
        assert settings.task is not None
        self.dropout_p, self.dropout_id = settings.dropout_p, settings.dropout_id
        self.output = Linear(settings.config.hidden_size, int(settings.task.high) + 1)

    @classmethod
    def metrics_for(cls, task: TaskSchema) -> tuple[Metric, ...]:
        """Return F1 of entities first, where there are any; else not at all."""
        entities = task.scheme != "none"
        own = [metric for metric in cls.metrics if entities or metric.name != "entity_f1"]
        return tuple(sorted(own, key=lambda metric: metric.name != "entity_f1"))

    def forward(self, states: TaskStates) -> Tensor:
        """Return the logits ``[m, C]``; of a word without a token those of a state of zeros."""
        labels = states.labels
        assert isinstance(labels, TaggedTokens), "the batch has no words"
        rows = kernels.take_rows(states.tokens, labels.positions)
        rows = kernels.dropout(
            rows,
            self.dropout_p,
            training=self.training,
            seed=states.seed,
            rng_offset=self.dropout_id,
        )
        return at_least_fp32(self.output(rows))

    def loss(self, scores: Tensor, labels: Labels | None) -> Tensor:
        """Return the mean cross entropy of the tags, or that of its ``class_loss``.

        It is 0 where no tag counts.
        """
        if not isinstance(labels, TaggedTokens):
            raise ValueError(f"labels: none for task {self.name!r}, which is to be trained")
        if self.class_loss is not None and not self.class_loss.is_plain:
            loss: Tensor = self.class_loss(scores.log_softmax(1), labels.targets)
            return loss
        total = F.cross_entropy(scores, labels.targets, reduction="sum", ignore_index=-100)
        return total / (labels.targets >= 0).sum().clamp(min=1)

    def predict(self, scores: Tensor) -> Tensor:
        """Return the likeliest tags, int64."""
        return scores.argmax(1)

    def certainty(self, scores: Tensor) -> Tensor:
        """Return their probabilities."""
        return scores.softmax(1).amax(1)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Return those of all tags."""
        return scores.softmax(1)

    def as_linear(self) -> LinearHead | None:
        """Return the output layer, which reads the states of tokens."""
        weight, bias = (x.detach().float().cpu() for x in (self.output.weight, self.output.bias))
        return LinearHead(weight, bias, "single_label_classification", reads_tokens=True)
