"""ModernBERT on packed tokens.

Some of its layers see all tokens of a sequence, others those in a window around the query.  Its
attention goes through transformers' registry, so that layers keep their own code; the model gets
its masks from here, since a window's is not recognised when transformers makes it.
"""

from typing import Any

from .transformers_layers import Mask
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


MODERNBERT = Family(
    count_from_zero,
    encoder=None,
    model=ModernBertModel,
    span_states="head",
    span_logits="classifier",
)
