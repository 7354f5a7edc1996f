"""The tables of a recipe that are small: how a task is read, the shape of an encoder."""

from typing import Annotated, Literal

from pydantic import Field

from .data.source import TaskSource
from .model.heads import FEATURES, LOSSES
from .settings import Count, Fraction, Positive, PositiveReal, Settings


class TaskRecipe(Settings):
    """How one task is read off the encoder."""

    features: Literal[FEATURES]  # type: ignore[valid-type]
    """What the head sees: single or bilstm of one sentence; of two, one of mean, concat, distance,
    difference, shared, cosine, cosine_shifted, pearson, cross (engine/model/features.py)."""
    loss: Literal[LOSSES] = "default"  # type: ignore[valid-type]
    """default: squared error for scores, cross entropy for the rest; cross_entropy, for scores:
    that of a share of their range; mse."""
    weight: PositiveReal = 1.0
    """Multiplies the task's loss, and so its gradient, before the gradients are balanced."""
    first: Count = 0
    """Train on the first so many examples of the training set; 0: on all."""
    source: TaskSource | None = None
    """Where the examples come from and what they look like; a built-in task needs none."""


class EncoderRecipe(Settings):
    """The encoder that is trained from scratch when no ``--init`` gives weights."""

    vocab_size: Annotated[int, Field(ge=16, lt=1 << 31)] = 4096
    """Most entries of the WordPiece vocabulary, which is learnt from the training sentences."""
    hidden_size: Positive = 128
    """Width."""
    num_hidden_layers: Positive = 2
    """Layers."""
    num_attention_heads: Positive = 4
    """Attention heads of a layer; they share the width."""
    intermediate_size: Positive = 512
    """Width of the feed-forward layer."""
    max_position_embeddings: Annotated[int, Field(ge=3, lt=1 << 31)] = 128
    """Longest sequence."""
    initializer_range: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Standard deviation of initial weights."""
    hidden_dropout_prob: Fraction = 0.1
    """Dropout of embeddings and of layer outputs."""
    attention_probs_dropout_prob: Fraction = 0.1
    """Dropout of attention probabilities."""
