"""The tables of a recipe that are small: how a task is read, the shape of an encoder."""

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError

from ..data.source import TaskSource
from ..models.config import MOST_LAYERS, EncoderConfig
from ..models.heads import (
    BALANCED,
    FEATURES,
    HALF,
    LOSSES,
    THRESHOLDS,
    ClassLossSettings,
    SimilaritySettings,
)
from ..models.registry import DEFAULT, MODELS
from ..utils.errors import InputError
from ..utils.field_types import (
    LARGEST_REAL,
    Count,
    Fraction,
    NonNegativeReal,
    Positive,
    PositiveReal,
    Settings,
)
from .messages import first_problem

CHANGEABLE = frozenset(("initializer_range", "hidden_dropout_prob", "attention_probs_dropout_prob"))
"""What can be changed in a pretrained encoder; all else is the shape of its weights."""


def model_types() -> tuple[str, ...]:
    """Return the architectures that can be trained from scratch."""
    return tuple(dict.fromkeys(spec.config.model_type for spec in MODELS.values()))


def _with_config(name: str) -> str:
    if name not in model_types():
        raise ValueError(f"expected {' or '.join(model_types())}")
    return name


def _weights_or_balanced(weights: Any) -> Any:
    """Check both forms here, since pydantic's errors on a union name the one it tried."""
    if weights == BALANCED:
        return weights
    if isinstance(weights, list | tuple) and all(
        type(weight) in (int, float) and 0 < weight <= LARGEST_REAL for weight in weights
    ):
        return weights
    raise ValueError(f"expected a list of positive numbers, one for each class, or {BALANCED!r}")


class TaskRecipe(Settings):
    """How one task is read off the encoder."""

    head: Literal[FEATURES]  # type: ignore[valid-type]
    """What the head sees: single or bilstm of one sentence; of two, one of mean, concat, distance,
    difference, shared, cosine, cosine_shifted, pearson, cross
    (engine/models/heads/pair_features.py); tokens of words with tags and of spans; of retrieval
    cosine or dot."""
    loss: Literal[LOSSES] = "default"  # type: ignore[valid-type]
    """default: squared error for scores, cross entropy for the rest; cross_entropy, for scores:
    that of a share of their range; mse; triplet, for retrieval with negatives; contrastive, for
    two classes of pairs by a similarity."""
    weight: PositiveReal = 1.0
    """Multiplies the task's loss, and so its gradient, before the gradients are balanced."""
    metrics: tuple[str, ...] = ()
    """What the task is scored by; the first decides which checkpoint is best (decided_by).  Empty:
    accuracy of classes, Pearson correlation of scores, F1 of several labels (f1_micro), of
    entities and of the words of answers (squad_f1)."""
    decided_by: Literal["first", "mean"] = "first"
    """The task's score, which decides which checkpoint is best: the first of its metrics, or the
    mean of all."""
    score_weight: NonNegativeReal = 1.0
    """The weight of the task's score in the overall score; 0: it does not count."""
    tag_pieces: Literal["first", "all"] = "first"
    """token_classification: train the tag of a word on its first token, or on all of them."""
    class_weights: Annotated[
        tuple[PositiveReal, ...] | Literal["balanced"], BeforeValidator(_weights_or_balanced)
    ] = ()
    """Factors on the losses of the examples (or tagged words) of each class, a list; or balanced:
    n / (C n_c) of n training examples in C classes, n_c of the class.  Of several labels: factors
    on the examples that have the label; balanced: those without over those with it.  Their mean
    over the training examples is made 1 (engine/models/heads/class_loss.py)."""
    label_smoothing: Fraction = 0.0
    """Share of each label that is spread over all classes evenly, from 0 to 1, exclusive; of
    several labels, over yes and no."""
    focal_gamma: NonNegativeReal = 0.0
    """Focal loss: the loss of a class of probability p is multiplied by (1 - p)^focal_gamma; 0:
    none."""
    temperature: NonNegativeReal = 0.0
    """retrieval: what similarities are divided by before the softmax over passages; 0: 0.05 of
    cosines, 1 of dot products.  sentence-transformers calls its inverse scale."""
    symmetric: bool = False
    """retrieval: let passages find their anchors, too, and take the mean of both losses."""
    margin: PositiveReal = 0.5
    """loss = triplet: by how much an anchor is to be more similar to its passage than to a
    negative.  loss = contrastive: the distance (1 - similarity) from which on pairs of class 0 are
    far enough apart; half of it is the threshold."""
    threshold: Literal[THRESHOLDS] = HALF  # type: ignore[valid-type]
    """Two classes, or several labels: a probability above which the answer is yes: half, 1/2; dev:
    the one that scores best on the dev data, chosen at every evaluation, by the deciding metric;
    dev_per_label: one for each of several labels (engine/models/heads/thresholds.py)."""
    batch_size: Count = 0
    """Examples of the task in a step; 0: as the recipe's batch_size and sampling_alpha say."""
    first_n: Count = 0
    """Train on the first so many examples of the training set; 0: on all."""
    source: TaskSource | None = None
    """Where the examples come from and what they look like; a built-in task needs none."""

    @property
    def similarity(self) -> SimilaritySettings:
        """Settings of a loss that compares similarities."""
        return SimilaritySettings(self.temperature, self.symmetric, self.margin)

    @property
    def class_loss(self) -> ClassLossSettings:
        """What the loss does against classes of unequal size."""
        return ClassLossSettings(self.class_weights, self.label_smoothing, self.focal_gamma)


class EncoderRecipe(Settings):
    """The encoder: its shape when it is trained from scratch, and its dropout.

    With ``--init`` the dropout rates that are set take the place of the model's own.  The shape is
    the model's: one that ``--set`` gives, or a file beside its own ``init``, has to agree.  The
    shape in a file without ``init`` is that of the encoder from scratch, and set aside.
    """

    model_type: Annotated[str, AfterValidator(_with_config)] = DEFAULT
    """Architecture."""
    vocab_size: Annotated[int, Field(ge=16, lt=1 << 31)] = 4096
    """Most entries of the WordPiece vocabulary, which is learnt from the texts that are trained on:
    of tasks and objectives, in any phase."""
    hidden_size: Positive = 128
    """Width."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=MOST_LAYERS)] = 2
    """Layers."""
    num_attention_heads: Positive = 4
    """Attention heads of a layer; they share the width."""
    intermediate_size: Positive = 512
    """Width of the feed-forward layer."""
    max_position_embeddings: Annotated[int, Field(ge=3, lt=1 << 31)] = 128
    """Longest sequence."""
    initializer_range: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Standard deviation of initial weights; with ``--init`` of those that the model lacks, of
    adapters and of heads of objectives."""
    hidden_dropout_prob: Fraction = 0.1
    """Dropout of embeddings and of layer outputs."""
    attention_probs_dropout_prob: Fraction = 0.1
    """Dropout of attention probabilities."""

    _set_aside: dict[str, int | str] = PrivateAttr(default_factory=dict)

    def without_shape(self, names: Collection[str]) -> "EncoderRecipe":
        """Return the same without the fields of the shape among ``names``; they are set aside."""
        of_shape = self.model_fields_set.intersection(names) - CHANGEABLE
        kept = EncoderRecipe(**self.model_dump(exclude_unset=True, exclude=of_shape))
        aside = self.model_dump(include=of_shape)
        kept._set_aside = self._set_aside | aside
        return kept

    def set_aside(self, config: EncoderConfig) -> dict[str, int | str]:
        """Return the fields that were set aside and that ``config`` has otherwise."""
        aside = self._set_aside.items()
        return {name: value for name, value in aside if getattr(config, name) != value}

    def of_model(self, config: EncoderConfig, model: str) -> tuple["EncoderRecipe", EncoderConfig]:
        """Return the settings in force for a pretrained encoder, and its config under them.

        Args:
            config: the model's own.
            model: what to call it in messages.

        Raises:
            InputError: the shape contradicts the model's, or the model is too small to be used.
        """
        for name in sorted(self.model_fields_set - CHANGEABLE):
            given, own = getattr(self, name), getattr(config, name)
            if not _fits(name, given, config):
                raise InputError(
                    f"encoder.{name} = {given}: {model} has {own}, and its weights keep their "
                    "shape; leave it out"
                )
        changed = {name: getattr(self, name) for name in self.model_fields_set & CHANGEABLE}
        config = config.changed(**changed)
        values = {name: getattr(config, name) for name in EncoderRecipe.model_fields}
        try:
            EncoderRecipe(**values)
        except ValidationError as error:
            raise InputError(f"{model}: encoder.{first_problem(error, EncoderRecipe)}") from None
        # What was set by hand is still told from what is the model's own.
        settings = EncoderRecipe.model_construct(_fields_set=set(self.model_fields_set), **values)
        # A larger limit than the model's vocabulary contradicts nothing, and changes nothing.
        given = {name: getattr(self, name) for name in self.model_fields_set - CHANGEABLE}
        settings._set_aside = self._set_aside | given
        return settings, config


def _fits(name: str, value: Any, config: EncoderConfig) -> bool:
    """Return whether a model has the shape that a recipe gives; its vocabulary may be smaller."""
    own = getattr(config, name)
    return bool(own <= value if name == "vocab_size" else own == value)
