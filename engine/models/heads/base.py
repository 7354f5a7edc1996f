"""The interface of a head: everything in the engine that depends on a task's or objective's kind.

A head belongs to one task, so autograd adds its gradients into that task's row
(engine/gradients/flat_parameters.py); only shared layers have to separate the tasks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ...data.task_batch import Labels
from ...data.task_schema import TaskSchema
from ...utils.errors import InputError
from ..config import EncoderConfig
from ..layers import Embedding
from ..pooling import TaskStates
from ..step_scores import StepScores
from .class_loss import PLAIN, ClassLoss, ClassLossSettings
from .metrics import Metric
from .similarity_loss import IN_BATCH, SimilaritySettings
from .thresholds import HALF

LOSSES = ("default", "mse", "cross_entropy", "triplet", "contrastive")
"""Names that a recipe's ``loss`` may have; each kind takes some."""

Scores = Tensor | tuple[Tensor, ...]
"""The output of a head, which its loss takes; for a task with a metric a tensor ``[n, …]``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSettings:
    """Settings that a head is built from.

    Attributes:
        kind: a key of :data:`~engine.models.heads.HEADS`.
        name: of the task or objective.
        config: of the encoder.
        task: the schema of its data; None for an objective.
        features: the recipe's name for the inputs of a task's head.
        loss: one of LOSSES.
        class_loss: what the loss does against classes of unequal size.
        similarity: of a loss that compares similarities.
        threshold: one of THRESHOLDS.
        dropout_p: of the dropout before the output layer, in training.
        dropout_id: of its dropout; the RNG offset.
        temperature: that a contrastive loss divides cosines by.
    """

    kind: str
    name: str
    config: EncoderConfig
    task: TaskSchema | None = None
    features: str = ""
    loss: str = "default"
    class_loss: ClassLossSettings = PLAIN
    similarity: SimilaritySettings = IN_BATCH
    threshold: str = HALF
    dropout_p: float = 0.0
    dropout_id: int = 0
    temperature: float = 1.0


class HeadExport(NamedTuple):
    """An export's record of a head.

    Attributes:
        layout: its entry in the metadata of ``heads.safetensors``, written as JSON.
        tensors: its weights by name, without the task's.
    """

    layout: dict[str, object]
    tensors: dict[str, Tensor]


class LinearHead(NamedTuple):
    """A head as a linear layer, which models of other libraries hold.

    Attributes:
        weight: ``[L, H]``, fp32, of the output layer.
        bias: ``[L]``.
        problem_type: by transformers' name: ``single_label_classification``, whose outputs are the
            logits of L classes; ``multi_label_classification``, those of L labels; ``regression``,
            a value.
        share_of: the range of the labels that the output is the logit of a share of; None where it
            is as ``problem_type`` says.
        reads_tokens: whether its input is each token's state, not a vector of the sequence.
    """

    weight: Tensor
    bias: Tensor
    problem_type: str
    share_of: tuple[float, float] | None = None
    reads_tokens: bool = False


class Head(nn.Module, ABC):
    """A head of one task or objective: scores, loss, answers and export.

    Class attributes:
        known_features: the values that ``features`` may have; empty for an objective.
        known_losses: those of LOSSES that it can be trained by.
        needs_classes: whether labels have to be classes, not numbers within a range.
        metrics: that its answers can be scored by, the default first; none for an objective.
        weighs_classes: whether it is trained by a :class:`.class_loss.ClassLoss` where one is
            asked for.
        known_thresholds: those of THRESHOLDS that its answers can depend on.
        is_pretrained: whether pretrained models have weights for it.
        varies_in_size: whether batches of equally many examples have scores of other lengths.
        fills_masks: whether :meth:`word_logits` predicts masked words.
        answers_text: the sentence about its ``answers`` in the model card of an export.
        answers_code: by the name of its ``answers``, the Python expression by which the card's
            example turns the output ``x [1, outputs]`` into an answer; it may use ``low`` and
            ``span``.  The example evaluates the expressions of all heads, so none may fail on
            another's output.

    Attributes:
        name: of the task or objective.
        task: the schema of its data; None for an objective.
        features: the recipe's name for its inputs.
        uses: the shared layers that it uses, by their names in SharedLayers.
        answers: an export's name for its outputs; a key of ``answers_code``, but of a head whose
            answers the card's example does not give.
        reads_tokens: whether it reads the tokens' states, not the sentence vectors alone.
        compares: whether its loss compares the examples of a step with each other.
        class_loss: what its loss does against classes of unequal size; None for nothing.

    Raises:
        InputError: the settings contradict each other; the message names the recipe's key.
    """

    known_features: ClassVar[tuple[str, ...]] = ()
    known_losses: ClassVar[tuple[str, ...]] = ("default",)
    needs_classes: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = ()
    weighs_classes: ClassVar[bool] = False
    known_thresholds: ClassVar[tuple[str, ...]] = (HALF,)
    is_pretrained: ClassVar[bool] = False
    varies_in_size: ClassVar[bool] = False
    fills_masks: ClassVar[bool] = False
    answers_text: ClassVar[str] = ""
    answers_code: ClassVar[Mapping[str, str]] = MappingProxyType({})

    answers: str = ""
    reads_tokens: bool = False

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__()
        self.check(settings)
        self.name, self.task, self.features = settings.name, settings.task, settings.features
        self.uses = self.layers_used(settings)
        self.compares = self.compares_examples(settings.loss)
        self.class_loss: ClassLoss | None = None
        if settings.class_loss.given:
            assert settings.task is not None
            self.class_loss = ClassLoss(settings.class_loss, settings.task)

    @classmethod
    def check(cls, settings: HeadSettings) -> None:
        """Refuse features, losses and labels that the task cannot have.

        A head with further conditions extends it, and calls this one first.

        Raises:
            InputError: the message names the recipe's key.
        """
        if settings.task is None:
            return
        table = f"tasks.{settings.name}"
        if cls.needs_classes and not settings.task.whole:
            raise InputError(
                f"{table}.source.classes: {settings.kind} needs at least two, by name or as a "
                "number"
            )
        allowed = cls.features_for(settings.task)
        if not allowed:
            raise InputError(
                f"{table}.source.text: {len(settings.task.sentences)} given, which no head for "
                f"{settings.kind} reads; it has {', '.join(cls.known_features)}"
            )
        if settings.features not in allowed:
            raise InputError(
                f"{table}.head = {settings.features!r}: expected {' or '.join(allowed)}"
            )
        if settings.loss not in cls.known_losses:
            raise InputError(
                f"{table}.loss = {settings.loss!r}: a head for {settings.kind} is trained by "
                f"{' or '.join(cls.known_losses)}"
            )
        if settings.threshold not in cls.known_thresholds:
            others = " or ".join(map(repr, cls.known_thresholds))
            reason = f"has {others}" if len(cls.known_thresholds) > 1 else "has no threshold"
            raise InputError(
                f"{table}.threshold = {settings.threshold!r}: a head for {settings.kind} {reason}"
            )
        for name in settings.class_loss.given if not cls.weighs_classes else ():
            value = getattr(settings.class_loss, name)
            raise InputError(
                f"{table}.{name} = {value!r}: a head for {settings.kind} has no loss over classes "
                "to change; leave it out"
            )

    @classmethod
    def features_for(cls, _task: TaskSchema) -> tuple[str, ...]:
        """Return the features that a task's head can take."""
        return cls.known_features

    @classmethod
    def metrics_for(cls, _task: TaskSchema) -> tuple[Metric, ...]:
        """Return the metrics that a task can be scored by, the default first."""
        return cls.metrics

    @classmethod
    def layers_used(cls, _settings: HeadSettings) -> tuple[str, ...]:
        """Return the shared layers that a head uses: fields of SharedLayers.

        It is called before the head is built, since shared layers are built first.
        """
        return ()

    @property
    def shape_of_scores(self) -> tuple[int, ...]:
        """The shape of the scores of one example, where the head compares examples."""
        raise TypeError(f"{self.name}: compares no examples")

    @classmethod
    def compares_examples(cls, _loss: str) -> bool:
        """Return whether a loss compares the examples of a step with each other.

        Micro-batches and ranks then need each other's scores: :meth:`step_loss`.
        """
        return False

    @property
    def is_scored(self) -> bool:
        """Whether it has answers to score: a task's head has, an objective's has not."""
        return bool(self.metrics)

    @abstractmethod
    def forward(self, states: TaskStates) -> Scores:
        """Score the task's n examples, in fp32 (float64 from float64)."""

    @abstractmethod
    def loss(self, scores: Any, labels: Labels | None) -> Tensor:
        """Return the mean loss over the examples, 0-dim.

        Args:
            scores: from :meth:`forward`.
            labels: of the batch.

        Raises:
            ValueError: there are no labels, and the loss needs some.
        """

    def step_loss(self, scores: Tensor, labels: Labels | None, of_step: StepScores) -> Tensor:
        """Return the share of these examples in the mean loss of a step, 0-dim.

        Its gradient is that of the whole mean, to these scores.

        Args:
            scores: from :meth:`forward`, of a micro-batch.
            labels: of the micro-batch.
            of_step: the scores of all examples of the step.
        """
        raise TypeError(f"{self.name}: compares no examples, of {scores}, {labels} or {of_step}")

    def predict(self, scores: Tensor) -> Tensor:
        """Return the answers as labels are, ``[n]``: class numbers, values.

        Of L labels ``[n, L]``, 0 or 1.
        """
        raise TypeError(f"{self.name}: an objective answers nothing, got {tuple(scores.shape)}")

    def certainty(self, scores: Tensor) -> Tensor:
        """Return the probability ``[n]`` of each answer; 1 for a head without probabilities."""
        return scores.new_ones(len(scores))

    def probabilities(self, _scores: Tensor) -> Tensor | None:
        """Return the probability of each class or label, ``[n, C]``; None for a head without."""
        return None

    def exported(self) -> HeadExport | None:
        """Return its record in an export; None for an objective, whose head is not exported."""
        task = self.task
        if task is None:
            return None
        layout = {"features": self.features, "answers": self.answers}
        span = {"low": task.low, "high": task.high}
        return HeadExport(layout | span | {"classes": task.classes}, self.state_dict())

    def as_linear(self) -> LinearHead | None:
        """Return it as a linear layer on one sequence; None where it computes anything else."""
        return None

    def load_pretrained(self, _tensors: Mapping[str, Tensor]) -> bool:
        """Load the weights that a Hugging Face model has for it; return whether there were any.

        It is given the weights of the pretraining heads, under BERT's names.
        """
        return False

    def to_pretrained(self) -> dict[str, Tensor]:
        """Return the weights that :meth:`load_pretrained` loads, of masked LM; none of others."""
        return {}

    def word_logits(self, hidden: Tensor, word: Embedding) -> Tensor:
        """Return a logit for each word, ``[m, H]`` to ``[m, V]``, where it ``fills_masks``.

        Args:
            hidden: ``[m, H]``, states of masked tokens.
            word: the word table.
        """
        raise TypeError(f"{self.name}: fills no masks, of {tuple(hidden.shape)} or {word}")

    def given(self, labels: Labels | None, scores: Tensor) -> Tensor:
        """Return a task's labels, ``[n]`` or ``[n, L]``, in the dtype of the scores.

        Raises:
            ValueError: there are none.
        """
        if not isinstance(labels, Tensor):
            raise ValueError(f"labels: none for task {self.name!r}, which is to be trained")
        return labels.to(scores.dtype)
