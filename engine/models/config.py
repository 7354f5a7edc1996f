"""The shape of an encoder, read from and written to a Hugging Face ``config.json``."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..utils.errors import InputError

MOST_LAYERS = 1024
"""Far beyond any encoder's; each takes time and memory to build, however narrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Shape and constants of a BERT encoder, under the names that ``config.json`` gives them."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
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
        if self.hidden_act != "gelu":
            raise InputError(f"hidden_act = {self.hidden_act!r}: expected 'gelu' (erf)")

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> "EncoderConfig":
        """Read the encoder's shape out of a BERT's ``config.json``.

        Raises:
            InputError: it describes no encoder of this kind, or a field is missing or out of range.
        """
        positions = config.get("position_embedding_type", "absolute")
        if positions != "absolute":
            raise InputError(f"position_embedding_type = {positions!r}: expected 'absolute'")
        if config.get("is_decoder") or config.get("add_cross_attention"):
            raise InputError("a decoder or cross attention: expected a plain encoder")
        width = config.get("hidden_size")
        if "embedding_size" in config and config["embedding_size"] != width:
            raise InputError(
                f"embedding_size = {config['embedding_size']!r}: expected hidden_size, {width!r}; "
                "a projection between the two is not supported"
            )
        known = {field.name: field for field in dataclasses.fields(cls)}
        missing = [
            name
            for name, field in known.items()
            if field.default is dataclasses.MISSING and name not in config
        ]
        if missing:
            raise InputError(f"missing {', '.join(missing)}")
        return cls(**{name: config[name] for name in known if name in config})

    def to_huggingface(self) -> dict[str, Any]:
        """Return the ``config.json`` of a ``transformers.BertModel`` of this shape."""
        return {
            "architectures": ["BertModel"],
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "pad_token_id": 0,
            **dataclasses.asdict(self),
        }
