"""ModernBERT on packed tokens.

Some of its layers see all tokens of a sequence, others those in a window around the query.  Its
attention goes through transformers' registry, so that layers keep their own code; the model gets
its masks from here, since a window's is not recognised when transformers makes it.  In its
feed-forward network the activation, the gate and the dropout are one pass.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ..gated_activation.gated_activation import geglu
from .class_exchange import Exchanged
from .transformers_layers import Dropout, Mask, are_few, is_plain, is_unwatched
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
    layers={"ModernBertMLP": ModernBertMLP},
    model=ModernBertModel,
    span_states="head",
    span_logits="classifier",
)
