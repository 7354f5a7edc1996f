"""BERT (Devlin et al. 2019) on packed tokens: no padding, one stream for all tasks.

A batch is a stream of T tokens, its sequences concatenated; ``cu_seqlens [S + 1]`` says where each
begins.  Attention alone uses the boundaries; everything else works token by token.

Models that compute what a BERT computes (engine/models/families.py) are converted to it.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .._kernels import kernels
from ..utils.errors import InputError
from .bert_tasks import bert_task
from .config import EncoderConfig
from .context import Context
from .encoder import Encoder, Projection, Stage
from .families import FAMILIES, bert_fields, bert_tensors, name_in_family
from .layers import Embedding, LayerNorm, Linear, feed_forward
from .spec import ModelSpec, StoredWeights, Weight

# Each dropout has an id, so that one seed a step gives each of them its own random numbers.
_EMBEDDING_DROPOUT_ID = 0
_DROPOUTS_PER_LAYER = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BertConfig(EncoderConfig):
    """Shape and constants of a BERT, under the names that ``config.json`` gives them."""

    model_type: ClassVar[str] = "bert"

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
        EncoderConfig.__post_init__(self)
        if self.hidden_act != "gelu":
            raise InputError(f"hidden_act = {self.hidden_act!r}: expected 'gelu' (erf)")

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape out of the ``config.json`` of a BERT or of one of its relatives.

        Raises:
            InputError: it describes no encoder of this kind, or a field is missing or out of range.
        """
        config = bert_fields(config)
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
        return cls._from_fields(config)

    def to_huggingface(self) -> dict[str, Any]:
        """Return the ``config.json`` of a ``transformers.BertModel`` of this shape."""
        return {
            "architectures": ["BertModel"],
            "model_type": self.model_type,
            "position_embedding_type": "absolute",
            "pad_token_id": 0,
            **dataclasses.asdict(self),
        }


class BertEncoder(Encoder):
    """Embeddings, then layers."""

    config: BertConfig
    projections = MappingProxyType(
        {
            "query": Projection("qkv", 0, 3),
            "key": Projection("qkv", 1, 3),
            "value": Projection("qkv", 2, 3),
            "attention_output": Projection("attention_output"),
            "intermediate": Projection("intermediate"),
            "output": Projection("output"),
        }
    )

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.layers = nn.ModuleList(
            BertLayer(config, index) for index in range(config.num_hidden_layers)
        )

    def stages(self) -> list[Stage]:
        """Return the embeddings and each layer."""
        layers = [Stage(f"layers.{index}", layer) for index, layer in enumerate(self.layers)]
        return [Stage("embeddings", self.embeddings), *layers]

    @property
    def word_table(self) -> Embedding:
        """The table of words."""
        return self.embeddings.word

    @property
    def num_dropouts(self) -> int:
        """Number of dropouts."""
        return _EMBEDDING_DROPOUT_ID + 1 + _DROPOUTS_PER_LAYER * len(self.layers)

    def lookups(self, input_ids: Tensor, context: Context) -> Iterable[tuple[Embedding, Tensor]]:
        """Return the three tables, and the entries ``[T]`` that a forward pass looks up in each."""
        tables = self.embeddings
        yield tables.word, input_ids
        yield tables.position, context.position_ids
        yield tables.token_type, context.token_type_ids


class BertEmbeddings(nn.Module):
    """Word + position + token type, normalised, dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, width, init_std=std)
        self.position = Embedding(config.max_position_embeddings, width, init_std=std)
        self.token_type = Embedding(config.type_vocab_size, width, init_std=std)
        self.norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, input_ids: Tensor, context: Context) -> Tensor:
        """Embed the stream's tokens ``[T]``: ``[T, H]``."""
        rows = None if context.segments is None else self._rows()
        return kernels.embedding_layer_norm(
            input_ids,
            context.position_ids,
            context.token_type_ids,
            self.word.weight,
            self.position.weight,
            self.token_type.weight,
            self.norm.weight,
            self.norm.bias,
            dropout_p=self.dropout_p,
            eps=self.norm.eps,
            training=self.training,
            seed=context.seed,
            rng_offset=_EMBEDDING_DROPOUT_ID,
            rows=rows,
            segments=context.segments,
            plan=None if rows is None else context.lookup_plan,
        )

    def _rows(self) -> kernels.EmbeddingRows | None:
        """Return the rows for task gradients; None in a model without a gradient buffer."""
        word, position, token_type = self.word.rows, self.position.rows, self.token_type.rows
        if word is None or position is None or token_type is None or self.norm.rows is None:
            return None
        return kernels.EmbeddingRows(word, position, token_type, self.norm.rows)


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and norm."""

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.index = index
        self.first_dropout_id = _EMBEDDING_DROPOUT_ID + 1 + _DROPOUTS_PER_LAYER * index
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.qkv = Linear(width, 3 * width, init_std=std)
        self.attention_output = Linear(width, width, init_std=std)
        self.attention_norm = LayerNorm(width, eps=config.layer_norm_eps)
        self.intermediate = Linear(width, config.intermediate_size, init_std=std)
        self.output = Linear(config.intermediate_size, width, init_std=std)
        self.output_norm = LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map hidden states ``[T, H]`` to ``[T, H]``; adapters add to the feed-forward output."""
        adapted = None if context.adapters is None else context.adapters(self.index, x)
        attended = kernels.flash_attn_varlen_qkvpacked_func(
            self.qkv(x, context).view(-1, 3, self.heads, self.head_dim),
            context.cu_seqlens,
            context.max_seqlen,
            dropout_p=self.attention_dropout_p if self.training else 0.0,
            seed=context.seed,
            rng_offset=self.first_dropout_id,
            plan=context.attention_plan,
        )
        assert isinstance(attended, Tensor)  # statistics, which would make it a tuple, are off
        hidden = self.attention_norm.add(
            self.attention_output.product(attended.flatten(1), context),
            x,
            context,
            dropout_p=self.hidden_dropout_p,
            rng_offset=self.first_dropout_id + 1,
            bias_of=self.attention_output,
        )
        return self.output_norm.add(
            feed_forward(self.intermediate, self.output, hidden, context),
            hidden if adapted is None else hidden + adapted,
            context,
            dropout_p=self.hidden_dropout_p,
            rng_offset=self.first_dropout_id + 2,
            bias_of=self.output,
        )


# Names of ours to Hugging Face's.  Theirs has query, key and value as three matrices; ours has one,
# since attention reads the three together.
_EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}
_LAYER = {
    "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention_output": ("attention.output.dense",),
    "attention_norm": ("attention.output.LayerNorm",),
    "intermediate": ("intermediate.dense",),
    "output": ("output.dense",),
    "output_norm": ("output.LayerNorm",),
}


def _weights(config: BertConfig) -> Iterator[Weight]:
    """Yield the names and the shape of every weight."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "embeddings.word": (config.vocab_size, width),
        "embeddings.position": (config.max_position_embeddings, width),
        "embeddings.token_type": (config.type_vocab_size, width),
        "qkv": (width, width),
        "attention_output": (width, width),
        "intermediate": (inner, width),
        "output": (width, inner),
    }
    for ours, theirs in _EMBEDDINGS.items():
        yield Weight(f"{ours}.weight", (f"{theirs}.weight",), shapes.get(ours, (width,)))
    yield Weight("embeddings.norm.bias", ("embeddings.LayerNorm.bias",), (width,))
    for index in range(config.num_hidden_layers):
        for ours, stored_names in _LAYER.items():
            shape = shapes.get(ours, (width,))
            for kind, of_kind in (("weight", shape), ("bias", shape[:1])):
                names = [
                    f"encoder.layer.{index}.{stored_name}.{kind}" for stored_name in stored_names
                ]
                yield Weight(f"layers.{index}.{ours}.{kind}", names, of_kind)


def _sort_weights(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> StoredWeights:
    """Separate the encoder's weights from those of its pretraining heads."""
    encoder, others = bert_tensors(config, tensors)
    head = {name: others.pop(name) for name in [*others] if name.startswith("cls.predictions.")}
    return StoredWeights(encoder, head, others)


def _pooler(config: BertConfig) -> dict[str, Tensor]:
    """Return the pooler of ``transformers.BertModel``, a layer on the first token's state.

    It is not trained here; it is written as the identity, so that every load has the same weights.
    """
    width = config.hidden_size
    return {"pooler.dense.weight": torch.eye(width), "pooler.dense.bias": torch.zeros(width)}


SPEC = ModelSpec(
    model_types=tuple(FAMILIES),
    name="BERT",
    config=BertConfig,
    encoder=BertEncoder,
    weights=_weights,
    sort_weights=_sort_weights,
    name_in=name_in_family,
    untrained=_pooler,
    untrained_note="the pooler above it is the identity, it was not trained",
    task_model=bert_task,
)
