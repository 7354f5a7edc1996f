"""ModernBERT on packed tokens.

Some of its layers see all tokens of a sequence, others those in a window around the query.  Its
attention goes through transformers' registry, so that layers keep their own code; the model gets
its masks from here, since a window's is not recognised when transformers makes it.  The residual
behind attention and the norm of the feed-forward network are one pass, and so are this network's
activation, gate and dropout.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..gated_activation.gated_activation import geglu
from ..layer_norm.layer_norm import dropout_add_layer_norm
from .class_exchange import Exchanged
from .transformers_layers import Dropout, LayerNorm, Mask, are_few, is_plain, is_unwatched
from .transformers_models import Family, PackedModel, count_from_zero
from .transformers_packing import Packing


class ModernBertModel(PackedModel):
    """A `ModernBertModel` that runs on packed tokens."""

    def run(self, inputs: dict[str, Any], packing: Packing) -> Any:
        """Run on the stream, with the masks of both kinds of layers."""
        config: Any = self.config
        masks = {
            "full_attention": Mask(causal=False),
            "sliding_attention": Mask(causal=False, window=config.sliding_window),
        }
        return super().run({**inputs, "attention_mask": masks}, packing)


class ModernBertLayer(Exchanged):
    """ModernBERT's layer, the residual behind attention and the next norm in one pass."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        position_embeddings: object = None,
        **kwargs: object,
    ) -> Tensor:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        kwargs |= {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
        norm = module.mlp_norm
        if not is_plain(norm, LayerNorm) or are_few(hidden_states.numel(), hidden_states):
            plain: Tensor = super().forward(hidden_states, **kwargs)
            return plain
        attended, *_ = module.attn(module.attn_norm(hidden_states), **kwargs)
        parameters = (norm.weight, norm.bias, 0.0, norm.eps)
        normed, total = dropout_add_layer_norm(attended, hidden_states, *parameters, prenorm=True)
        out: Tensor = total + module.mlp(normed)
        return out


class ModernBertMLP(Exchanged):
    """``Wo(drop(gelu(a) * b))`` of the halves of ``Wi(hidden_states)``, all between in one pass."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        drop = module.drop
        is_ours = is_gelu(module.act) and is_plain(drop, Dropout) and drop.p < 1
        if not is_ours or are_few(hidden_states.numel(), hidden_states):
            plain: Tensor = super().forward(hidden_states)
            return plain
        gated = geglu(module.Wi(hidden_states), dropout_p=drop.p, training=drop.training)
        out: Tensor = module.Wo(gated)
        return out


def is_gelu(activation: nn.Module) -> bool:
    """Whether a module is GELU by erf, and nothing listens to its calls."""
    from transformers.activations import GELUActivation

    if is_plain(activation, nn.GELU):
        return activation.approximate == "none"
    is_theirs = type(activation) is GELUActivation and is_unwatched(activation, GELUActivation)
    return is_theirs and activation.act is functional.gelu


MODERNBERT = Family(
    count_from_zero,
    encoder=None,
    layers={"ModernBertEncoderLayer": ModernBertLayer, "ModernBertMLP": ModernBertMLP},
    model=ModernBertModel,
    span_states="head",
    span_logits="classifier",
)
