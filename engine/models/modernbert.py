"""ModernBERT (Warner et al. 2024, arXiv:2412.13663) on packed tokens.

Pre-norm layers without biases: rotary positions, attention to all tokens of a sequence in some
layers and to a window around each in the others, a gated feed-forward layer::

    h = x + attention(norm(x)),   y = h + W_o (gelu(a) * b)    with [a, b] = W_i norm(h)

The first layer has no norm before attention, since the embeddings end with one; a last norm
follows the last layer.  Ettin, gte-modernbert, modernbert-embed and mmBERT have this architecture.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from .._kernels import kernels
from ..utils.errors import InputError
from .config import EncoderConfig, HeadBiases
from .context import Context
from .encoder import Encoder, Projection, Stage
from .layers import Embedding, LayerNorm, Linear
from .modernbert_tasks import modernbert_task
from .spec import ModelSpec, StoredWeights, Weight

FULL, SLIDING = "full_attention", "sliding_attention"
_FULL_EVERY = 3
"""Of so many layers one, the first, attends to all tokens."""
_MOST_POSITIONS = 1 << 20
"""Far beyond any encoder's; the tables of angles grow with it."""
_EMBEDDING_DROPOUT_ID = 0
_DROPOUTS_PER_LAYER = 3


class RopeTheta(NamedTuple):
    """The base of the rotary angles, by the kind of a layer's attention."""

    full_attention: float = 160_000.0
    sliding_attention: float = 10_000.0


_PUBLISHED_THETA = RopeTheta()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """Shape and constants.

    ``config.json`` calls ``layer_norm_eps`` ``norm_eps``, and has two rates, of the embeddings and
    within the feed-forward layers, for ``hidden_dropout_prob``, and ``attention_dropout`` for
    ``attention_probs_dropout_prob``, which is that of attention's output, too.

    Attributes:
        layer_types: the kind of each layer's attention, ``full_attention`` or
            ``sliding_attention``; empty for every third layer, from the first, full.
        local_attention: a token of a sliding layer sees ``local_attention // 2`` others to each
            side.
        rope_theta: the bases of the rotary angles.
        norm_bias, attention_bias, mlp_bias: whether these layers have biases.
        classifier_bias: whether the layer before the decoder of masked LM has one.
        initializer_cutoff_factor: initial weights are cut off at so many standard deviations.
    """

    model_type: ClassVar[str] = "modernbert"

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 8192
    layer_norm_eps: float = 1e-5
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_types: tuple[str, ...] = ()
    local_attention: int = 128
    rope_theta: RopeTheta = _PUBLISHED_THETA
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    classifier_bias: bool = False
    initializer_cutoff_factor: float | None = 2.0

    def __post_init__(self) -> None:
        EncoderConfig.__post_init__(self)
        if not self.layer_types:
            object.__setattr__(self, "layer_types", _layer_types(self.num_hidden_layers))
        if len(self.layer_types) != self.num_hidden_layers:
            raise InputError(
                f"layer_types: expected num_hidden_layers = {self.num_hidden_layers} of them, got "
                f"{len(self.layer_types)}"
            )
        for kind in self.layer_types:
            if kind not in (FULL, SLIDING):
                raise InputError(f"layer_types: expected {FULL} and {SLIDING}, got {kind!r}")
        for kind, theta in self.rope_theta._asdict().items():
            if type(theta) not in (int, float) or not 0 < theta < math.inf:
                raise InputError(f"rope_theta of {kind} = {theta!r}: expected a positive number")
        for name in ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} = {getattr(self, name)!r}: expected true or false")
        cutoff = self.initializer_cutoff_factor
        if cutoff is not None and not (type(cutoff) in (int, float) and 0 < cutoff < math.inf):
            raise InputError(f"initializer_cutoff_factor = {cutoff!r}: expected a positive number")
        if self.max_position_embeddings > _MOST_POSITIONS:
            raise InputError(
                f"max_position_embeddings = {self.max_position_embeddings}: expected at most "
                f"{_MOST_POSITIONS}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"hidden_size / num_attention_heads = {self.head_dim}: expected an even number, "
                "since rotary positions turn pairs"
            )

    @property
    def head_biases(self) -> HeadBiases:
        """Biases of masked LM's head."""
        return HeadBiases(dense=self.classifier_bias, norm=self.norm_bias)

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        """Read the shape out of a ``config.json``, of transformers 5 or of before.

        Before 5, ``global_attn_every_n_layers`` stood for ``layer_types``, and
        ``global_rope_theta`` and ``local_rope_theta`` for ``rope_parameters``.

        Raises:
            InputError: a field is missing, out of range, or of a model that is not supported.
        """
        if (activation := config.get("hidden_activation", "gelu")) != "gelu":
            raise InputError(f"hidden_activation = {activation!r}: expected 'gelu' (erf)")
        rates = [config.get(name, 0.0) for name in ("embedding_dropout", "mlp_dropout")]
        if rates[0] != rates[1]:
            raise InputError(
                f"embedding_dropout = {rates[0]!r}, mlp_dropout = {rates[1]!r}: expected the same"
            )
        fields = {name: value for name, value in config.items() if name not in _DERIVED}
        layers = config.get("num_hidden_layers")
        return cls._from_fields(
            fields
            | {
                "layer_norm_eps": config.get("norm_eps", 1e-5),
                "hidden_dropout_prob": rates[0],
                "attention_probs_dropout_prob": config.get("attention_dropout", 0.0),
                "layer_types": _read_layer_types(config, layers),
                "rope_theta": RopeTheta(*(_read_theta(config, kind) for kind in (FULL, SLIDING))),
            }
        )

    def to_huggingface(self) -> dict[str, Any]:
        """Return the ``config.json`` of a ``transformers.ModernBertModel`` of this shape.

        It says the bases of the angles and the kinds of layers in both forms, since transformers
        before 5 would take its own for those that it does not find.
        """
        fields = dataclasses.asdict(self)
        theta = RopeTheta(*fields.pop("rope_theta"))
        dropout_p = fields.pop("hidden_dropout_prob")
        return {
            "architectures": ["ModernBertModel"],
            "model_type": self.model_type,
            # transformers' own are numbers of its vocabulary, beyond smaller ones.
            **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
            "pad_token_id": 0,
            "hidden_activation": "gelu",
            "norm_eps": fields.pop("layer_norm_eps"),
            "embedding_dropout": dropout_p,
            "mlp_dropout": dropout_p,
            "attention_dropout": fields.pop("attention_probs_dropout_prob"),
            "layer_types": list(fields.pop("layer_types")),
            "rope_parameters": {
                kind: {"rope_type": "default", "rope_theta": base}
                for kind, base in theta._asdict().items()
            },
            "global_rope_theta": theta.full_attention,
            "local_rope_theta": theta.sliding_attention,
            **self._full_every(),
            **fields,
        }

    def _full_every(self) -> dict[str, int]:
        """Return the field for ``layer_types`` of transformers before 5, where one says it."""
        for every in range(1, self.num_hidden_layers + 1):
            if self.layer_types == _layer_types(self.num_hidden_layers, every):
                return {"global_attn_every_n_layers": every}
        return {}


# Fields of config.json that others here stand for.
_DERIVED = ("layer_types", "rope_theta", "layer_norm_eps", "hidden_dropout_prob")


def _layer_types(layers: int, every: int = _FULL_EVERY) -> tuple[str, ...]:
    return tuple(SLIDING if index % every else FULL for index in range(layers))


def _read_layer_types(config: Mapping[str, Any], layers: Any) -> tuple[str, ...]:
    """Return the kinds of layers that a ``config.json`` says; none where its number is wrong.

    Raises:
        InputError: they are no list of names, or the older field is no number.
    """
    kinds = config.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds):
            raise InputError(f"layer_types = {kinds!r}: expected a list of names")
        return tuple(kinds)
    every = config.get("global_attn_every_n_layers", _FULL_EVERY)
    if type(every) is not int or every < 1:
        raise InputError(f"global_attn_every_n_layers = {every!r}: expected a whole number above 0")
    # What is no number of layers is refused as such.
    return _layer_types(layers, every) if type(layers) is int and 0 < layers < 1 << 20 else ()


_OLD_THETA = {FULL: "global_rope_theta", SLIDING: "local_rope_theta"}


def _read_theta(config: Mapping[str, Any], kind: str) -> float:
    """Return the base of a kind of layers' angles.

    Raises:
        InputError: angles are scaled, or what should be a table is none.
    """
    if config.get("rope_scaling") is not None:
        raise InputError(f"rope_scaling = {config['rope_scaling']!r}: expected none")
    tables = config.get("rope_parameters")
    if tables is None:
        tables = {}
    own = tables.get(kind) if isinstance(tables, dict) else tables
    if own is None:
        own = {}
    if not isinstance(own, dict):
        raise InputError(f"rope_parameters = {tables!r}: expected a table for each kind of layer")
    if (scaling := own.get("rope_type", "default")) != "default":
        raise InputError(f"rope_parameters.{kind}.rope_type = {scaling!r}: expected 'default'")
    of_default: float = getattr(_PUBLISHED_THETA, kind)
    theta: float = own.get("rope_theta", config.get(_OLD_THETA[kind], of_default))
    return theta


class ModernBertEncoder(Encoder):
    """Embeddings, then layers, then a norm."""

    config: ModernBertConfig
    projections = MappingProxyType(
        {
            "query": Projection("qkv", 0, 3),
            "key": Projection("qkv", 1, 3),
            "value": Projection("qkv", 2, 3),
            "attention_output": Projection("attention_output"),
            "intermediate": Projection("gated"),
            "output": Projection("output"),
        }
    )

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        self.embeddings = ModernBertEmbeddings(config)
        # The layers of a kind share one, so that each is on a device once.
        tables = {kind: RotaryTables(config, kind) for kind in sorted({*config.layer_types})}
        self.layers = nn.ModuleList(
            ModernBertLayer(config, index, tables[kind])
            for index, kind in enumerate(config.layer_types)
        )
        self.final_norm = _norm(config)

    def stages(self) -> list[Stage]:
        """Return the embeddings, each layer, and the last norm."""
        layers = [Stage(f"layers.{index}", layer) for index, layer in enumerate(self.layers)]
        return [
            Stage("embeddings", self.embeddings),
            *layers,
            Stage("final_norm", self.final_norm),
        ]

    @property
    def word_table(self) -> Embedding:
        """The table of words."""
        return self.embeddings.word

    @property
    def num_dropouts(self) -> int:
        """Number of dropouts."""
        return _EMBEDDING_DROPOUT_ID + 1 + _DROPOUTS_PER_LAYER * len(self.layers)

    def lookups(
        self,
        input_ids: Tensor,
        context: Context,  # noqa: ARG002 (there is one table)
    ) -> Iterable[tuple[Embedding, Tensor]]:
        """Yield the table of words, and its entries ``[T]``."""
        yield self.embeddings.word, input_ids


class ModernBertEmbeddings(nn.Module):
    """Word vectors, normalised, dropout; positions enter in attention."""

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.word = Embedding(config.vocab_size, width, init_std=std)
        _cut_off(self.word, std, config)
        self.norm = _norm(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, input_ids: Tensor, context: Context) -> Tensor:
        """Embed the stream's tokens ``[T]``: ``[T, H]``."""
        return kernels.dropout(
            self.norm(self.word(input_ids, context), context),
            self.dropout_p,
            training=self.training,
            seed=context.seed,
            rng_offset=_EMBEDDING_DROPOUT_ID,
        )


class RotaryTables(nn.Module):
    """Cosines and sines ``[positions, D / 2]`` of the angles in a kind of layers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModernBertConfig, kind: str) -> None:
        super().__init__()
        theta = getattr(config.rope_theta, kind)
        cos, sin = kernels.rotary_tables(config.max_position_embeddings, config.head_dim, theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)


class ModernBertLayer(nn.Module):
    """Attention and a gated feed-forward layer, each behind a norm and added to its input."""

    def __init__(self, config: ModernBertConfig, index: int, rotary: RotaryTables) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        std = config.initializer_range
        # Of outputs, which add up over the layers.
        output_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.index, self.rotary = index, rotary
        self.first_dropout_id = _EMBEDDING_DROPOUT_ID + 1 + _DROPOUTS_PER_LAYER * index
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        side = config.local_attention // 2 if config.layer_types[index] == SLIDING else -1
        self.window_size = (side, side)
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.attention_norm = _norm(config) if index else None
        self.qkv = Linear(width, 3 * width, bias=config.attention_bias, init_std=std)
        self.attention_output = Linear(
            width, width, bias=config.attention_bias, init_std=output_std
        )
        self.mlp_norm = _norm(config)
        self.gated = Linear(width, 2 * inner, bias=config.mlp_bias, init_std=std)
        self.output = Linear(inner, width, bias=config.mlp_bias, init_std=output_std)
        for layer in (self.qkv, self.gated):
            _cut_off(layer, std, config)
        for layer in (self.attention_output, self.output):
            _cut_off(layer, output_std, config)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Map hidden states ``[T, H]`` to ``[T, H]``; adapters add to the output."""
        adapted = None if context.adapters is None else context.adapters(self.index, x)
        normed = x if self.attention_norm is None else self.attention_norm(x, context)
        qkv = kernels.apply_rotary_emb_qkv_(
            self.qkv(normed, context).view(-1, 3, self.heads, self.head_dim),
            self.rotary.cos,
            self.rotary.sin,
            position_ids=context.position_ids,
        )
        attended = kernels.flash_attn_varlen_qkvpacked_func(
            qkv,
            context.cu_seqlens,
            context.max_seqlen,
            dropout_p=self.attention_dropout_p if self.training else 0.0,
            window_size=self.window_size,
            seed=context.seed,
            rng_offset=self.first_dropout_id,
            plan=context.attention_plan,
        )
        assert isinstance(attended, Tensor)  # statistics, which would make it a tuple, are off
        normed, hidden = self.mlp_norm.add_prenorm(
            self.attention_output.product(attended.flatten(1), context),
            x,
            context,
            dropout_p=self.attention_dropout_p,
            rng_offset=self.first_dropout_id + 1,
            bias_of=self.attention_output,
        )
        widened = kernels.geglu(
            self.gated(normed, context),
            dropout_p=self.hidden_dropout_p,
            training=self.training,
            seed=context.seed,
            rng_offset=self.first_dropout_id + 2,
        )
        hidden = hidden + self.output(widened, context)
        return hidden if adapted is None else hidden + adapted


def _norm(config: ModernBertConfig) -> LayerNorm:
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)


def _cut_off(layer: Linear | Embedding, std: float, config: ModernBertConfig) -> None:
    """Draw a layer's weights from a normal distribution that is cut off."""
    cutoff = config.initializer_cutoff_factor
    bound = (3.0 if cutoff is None else cutoff) * std
    nn.init.trunc_normal_(layer.weight, 0.0, std, -bound, bound)


_LAYER = {
    "attention_norm": "attn_norm",
    "qkv": "attn.Wqkv",
    "attention_output": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "gated": "mlp.Wi",
    "output": "mlp.Wo",
}
"""Names of ours to Hugging Face's."""


def _weights(config: ModernBertConfig) -> Iterator[Weight]:
    """Yield the names and the shape of every weight."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "attention_norm": (width,),
        "qkv": (3 * width, width),
        "attention_output": (width, width),
        "mlp_norm": (width,),
        "gated": (2 * inner, width),
        "output": (width, inner),
    }
    has_bias = {
        "attention_norm": config.norm_bias,
        "qkv": config.attention_bias,
        "attention_output": config.attention_bias,
        "mlp_norm": config.norm_bias,
        "gated": config.mlp_bias,
        "output": config.mlp_bias,
    }

    def layer(ours: str, theirs: str, shape: Sequence[int], bias: bool) -> Iterator[Weight]:
        yield Weight(f"{ours}.weight", (f"{theirs}.weight",), tuple(shape))
        if bias:
            yield Weight(f"{ours}.bias", (f"{theirs}.bias",), tuple(shape[:1]))

    yield from layer(
        "embeddings.word", "embeddings.tok_embeddings", (config.vocab_size, width), bias=False
    )
    yield from layer("embeddings.norm", "embeddings.norm", (width,), config.norm_bias)
    for index in range(config.num_hidden_layers):
        for ours, theirs in _LAYER.items():
            if index or ours != "attention_norm":
                names = f"layers.{index}.{ours}", f"layers.{index}.{theirs}"
                yield from layer(*names, shapes[ours], has_bias[ours])
    yield from layer("final_norm", "final_norm", (width,), config.norm_bias)


_PREFIX = "model."
_HEAD = {
    "head.dense.": "cls.predictions.transform.dense.",
    "head.norm.": "cls.predictions.transform.LayerNorm.",
    "decoder.bias": "cls.predictions.bias",
}


def _sort_weights(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> StoredWeights:
    """Separate the encoder's weights from those of heads.

    Models for classification have a ``head``, too, but no ``decoder.bias``.  A head with another
    activation, or a decoder of its own, is none of this engine's.
    """
    found = dict(tensors)
    has_heads = any(name.startswith(_PREFIX) for name in found)
    is_known = config.get("classifier_activation", "gelu") == "gelu" and config.get(
        "tie_word_embeddings", True
    )
    sorted_weights = StoredWeights({}, {}, {})
    for name, tensor in found.items():
        short = name.removeprefix(_PREFIX)
        theirs = next((prefix for prefix in _HEAD if name.startswith(prefix)), None)
        if name.startswith(_PREFIX) or (not has_heads and theirs is None):
            sorted_weights.encoder[short] = tensor
        elif theirs is not None and is_known:
            sorted_weights.pretrained_head[_HEAD[theirs] + name.removeprefix(theirs)] = tensor
        else:
            sorted_weights.others[name] = tensor
    return sorted_weights


def _store_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of masked LM's head to this model's."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        ours, berts = next(pair for pair in _HEAD.items() if name.startswith(pair[1]))
        renamed[ours + name.removeprefix(berts)] = tensor
    return renamed


SPEC = ModelSpec(
    model_types=("modernbert",),
    name="ModernBERT",
    config=ModernBertConfig,
    encoder=ModernBertEncoder,
    weights=_weights,
    sort_weights=_sort_weights,
    store_head=_store_head,
    task_model=modernbert_task,
    has_token_types=False,
)
