"""The interface of every encoder's config."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from ..utils.errors import InputError

MOST_LAYERS = 1024
"""Far beyond any encoder's; each takes time and memory to build, however narrow."""


class HeadBiases(NamedTuple):
    """Whether the layers of masked LM's head before the decoder have biases."""

    dense: bool = True
    norm: bool = True


class EncoderConfig:
    """Shape and constants of an encoder.

    Each encoder has a frozen dataclass of its own with at least these fields, which recipes, heads
    and adapters read.  Their names are BERT's, whatever the model's own ``config.json`` says.
    """

    __slots__ = ()

    model_type: ClassVar[str]
    """As in ``config.json``; by it engine/models/registry.py finds the rest of the model."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    layer_norm_eps: float
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    initializer_range: float

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            InputError: one is out of range.
        """
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.type is int and not (type(value) is int and 1 <= value < 1 << 31):
                raise InputError(
                    f"{field.name} = {value!r}: expected a whole number from 1 to 2^31 - 1"
                )
            if field.type is float and not (type(value) in (int, float) and 0 <= value < 1):
                raise InputError(f"{field.name} = {value!r}: expected a number in [0, 1)")
        if self.num_hidden_layers > MOST_LAYERS:
            raise InputError(
                f"num_hidden_layers = {self.num_hidden_layers}: expected at most {MOST_LAYERS}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size = {self.hidden_size} is not divisible by "
                f"num_attention_heads = {self.num_attention_heads}"
            )

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def head_biases(self) -> HeadBiases:
        """Biases of masked LM's head."""
        return HeadBiases()

    def changed(self, **fields: Any) -> Self:
        """Return the same with other values of some fields."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape out of a ``config.json``.

        Raises:
            InputError: it describes no encoder of this kind, or a field is missing or out of range.
        """
        raise NotImplementedError

    def to_huggingface(self) -> dict[str, Any]:
        """Return the ``config.json`` of an encoder of this shape in transformers."""
        raise NotImplementedError

    @classmethod
    def _from_fields(cls, config: Mapping[str, Any]) -> Self:
        """Take the fields of the dataclass from a mapping that may hold more.

        Raises:
            InputError: one without a default is missing, or is out of range.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in config
        ]
        if missing:
            raise InputError(f"missing {', '.join(missing)}")
        return cls(**{name: config[name] for name in known if name in config})
