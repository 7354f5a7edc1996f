"""An encoder as different from BERT as this engine allows, which lies in no module of the engine.

Pre-norm, one table, no biases, and a norm behind the last layer.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from engine.models.config import EncoderConfig
from engine.models.context import Context
from engine.models.encoder import Encoder, Stage
from engine.models.layers import Embedding, LayerNorm, Linear
from engine.models.spec import ModelSpec, StoredWeights, Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class PreNormConfig(EncoderConfig):
    """Its shape; nothing is dropped."""

    model_type: ClassVar[str] = "prenorm"

    vocab_size: int = 97
    hidden_size: int = 32
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    intermediate_size: int = 48
    max_position_embeddings: int = 64
    layer_norm_eps: float = 1e-6
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.2

    @classmethod
    def from_huggingface(cls, config: Mapping[str, Any]) -> Self:
        return cls._from_fields({"hidden_size": config["d_model"], **config})

    def to_huggingface(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {"model_type": self.model_type, "d_model": fields.pop("hidden_size"), **fields}


class PreNormLayer(nn.Module):
    """``h = x + attention(norm(x))``, then ``h + feed_forward(norm(h))``."""

    def __init__(self, config: PreNormConfig, number: int) -> None:
        super().__init__()
        width, std = config.hidden_size, config.initializer_range
        self.number, self.heads = number, config.num_attention_heads
        self.first = LayerNorm(width, eps=config.layer_norm_eps, bias=False)
        self.qkv = Linear(width, 3 * width, bias=False, init_std=std)
        self.out = Linear(width, width, bias=False, init_std=std)
        self.second = LayerNorm(width, eps=config.layer_norm_eps, bias=False)
        self.up = Linear(width, config.intermediate_size, bias=False, init_std=std)
        self.down = Linear(config.intermediate_size, width, bias=False, init_std=std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        adapted = 0 if context.adapters is None else context.adapters(self.number, x)
        qkv = self.qkv(self.first(x, context), context).unflatten(1, (3, self.heads, -1))
        attended = kernels.flash_attn_varlen_qkvpacked_func(
            qkv, context.cu_seqlens, context.max_seqlen
        )
        x = x + self.out(attended.flatten(1), context)
        widened = F.gelu(self.up(self.second(x, context), context))
        return x + self.down(widened, context) + adapted


class PreNormEncoder(Encoder):
    """A table, layers under another name than BERT's, a norm."""

    def __init__(self, config: PreNormConfig) -> None:
        super().__init__(config)
        self.table = Embedding(
            config.vocab_size, config.hidden_size, init_std=config.initializer_range
        )
        self.blocks = nn.ModuleList(
            PreNormLayer(config, number) for number in range(config.num_hidden_layers)
        )
        self.last = LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=False)

    def stages(self) -> list[Stage]:
        blocks = [Stage(f"blocks.{number}", block) for number, block in enumerate(self.blocks)]
        return [Stage("table", self.table), *blocks, Stage("last", self.last)]

    @property
    def word_table(self) -> Embedding:
        return self.table

    @property
    def num_dropouts(self) -> int:
        return 0

    def lookups(self, input_ids: Tensor, context: Context) -> Iterable[tuple[Embedding, Tensor]]:
        yield self.table, input_ids


def weights(config: PreNormConfig) -> Iterable[Weight]:
    """Yield every weight; in a folder, query, key and value are one tensor, too."""
    with torch.device("meta"):
        for name, tensor in PreNormEncoder(config).state_dict().items():
            yield Weight(name, (f"model.{name}",), tuple(tensor.shape))


SPEC = ModelSpec(
    model_types=("prenorm",),
    config=PreNormConfig,
    encoder=PreNormEncoder,
    weights=weights,
    sort_weights=lambda _config, tensors: StoredWeights(dict(tensors), {}, {}),
)
