"""MPNet on packed tokens.

A bias for the distance of query and key, one for each head, is added to the scores:

    P_h = softmax(Q_h K_h^T / sqrt(width) + bias_h[place of key - place of query])

Transformers' MPNet neither looks up its attention in the registry nor hands arguments on, so that
the model and its encoder have forward passes of their own here.  Layers get the packing as their
attention mask, and a row of biases for all distances instead of a matrix for all pairs.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..task_gradients.task_layers import autocast_dtype
from .class_exchange import Exchanged
from .transformers_embeddings import PlaceEmbeddings
from .transformers_layers import (
    PostNorm,
    add_and_norm,
    dropout_of,
    is_plain,
    products,
)
from .transformers_models import Family, PackedModel, count_tokens
from .transformers_packing import Packing


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, packing: Packing, dropout_p: float, scale: float
) -> Tensor:
    """Attention with biases for distances, on padded tensors.

    Rows without any token see all of their places alike, as in transformers.

    Args:
        q: ``[T, heads, width]``, likewise k and v.
        k: see q.
        v: see q.
        bias: ``[heads, 2 S - 1]``, any floating dtype, for key - query from ``1 - S`` to ``S - 1``,
            where S is ``packing.length``.
        packing: of the stream.
        dropout_p: probability to drop a probability.
        scale: of the products.

    Returns:
        ``[T, heads, width]``.
    """
    padded_q, padded_k, padded_v = (packing.pad(x[None]).transpose(1, 2) for x in (q, k, v))
    scores = padded_q @ padded_k.transpose(-1, -2) * scale
    # Row i of the matrix is S entries from S - 1 - i on.
    scores = scores + bias.unfold(1, packing.length, 1).flip(1)
    is_padding = ~packing.is_token()[:, None, None]
    # Added, and not put in their place, since so all scores have gradients in rows without tokens.
    lowest = scores.new_zeros(()).masked_fill(is_padding, torch.finfo(scores.dtype).min)
    probabilities = functional.dropout((scores + lowest).softmax(-1), dropout_p)
    return packing.pack((probabilities.to(v.dtype) @ padded_v).transpose(1, 2))[0]


class MPNetSelfAttention(Exchanged):
    """MPNet's self-attention, up to the linear layer behind it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        position_bias: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``.

        Args:
            hidden_states: of the stream.
            attention_mask: its packing.
            position_bias: ``[heads, 2 S - 1]``, see :func:`biased_attention`.
            _: what transformers' layers hand on besides.
        """
        module: Any = self
        return (module.o(self.attend(hidden_states, attention_mask, position_bias)),)

    def attend(self, hidden_states: Tensor, packing: object, bias: Tensor | None) -> Tensor:
        """Return the heads' outputs, side by side, ``[1, T, heads * width]``."""
        if not isinstance(packing, Packing) or bias is None:
            raise ValueError(
                "attention_mask: layers of an accelerated MPNet run within the model alone; call "
                "the model itself and not its parts"
            )
        module: Any = self
        x, width = hidden_states[0], module.attention_head_size
        layers = [module.q, module.k, module.v]
        qkv = products(x, layers)
        dtype = autocast_dtype(qkv) or qkv.dtype
        q, k, v = qkv.to(dtype).unflatten(1, (3, -1, width)).unbind(1)
        p = dropout_of(module.dropout, module.dropout.training)
        return biased_attention(q, k, v, bias, packing, p, 1 / math.sqrt(width)).flatten(1)[None]


class MPNetAttention(Exchanged):
    """MPNet's self-attention with the residual and the norm behind it."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        position_bias: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``; arguments as of the self-attention."""
        module: Any = self
        attended = module.attn(hidden_states, attention_mask, position_bias)[0]
        return (add_and_norm(attended, hidden_states, None, module.dropout, module.LayerNorm),)


class MPNetEncoder(Exchanged):
    """MPNet's layers."""

    def forward(
        self,
        hidden_states: Tensor,
        *_: object,
        packing: Packing | None = None,
        output_hidden_states: bool = False,
        **__: object,
    ) -> Any:
        """Map embeddings ``[1, T, H]`` to transformers' outputs, the last hidden state padded."""
        from transformers.modeling_outputs import BaseModelOutput

        if packing is None:
            raise ValueError(
                "packing: the encoder of an accelerated MPNet runs within the model alone; call "
                "the model itself and not its parts"
            )
        module: Any = self
        bias = self.position_bias(packing.length, hidden_states.device)
        states = [hidden_states]
        for layer in module.layer:
            states.append(layer(states[-1], packing, bias)[0])
        return BaseModelOutput(
            last_hidden_state=packing.pad(packing.cleared(states[-1])),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def position_bias(self, length: int, device: torch.device) -> Tensor:
        """Return the biases ``[heads, 2 S - 1]`` for distances from ``1 - S`` to ``S - 1``."""
        module: Any = self
        distances = torch.arange(1 - length, length, device=device)
        buckets = module.relative_position_bucket(distances)
        table = module.relative_attention_bias
        # Not by torch's embedding: these are no tokens, for whose tasks it would be taken.
        values: Tensor = table.weight[buckets] if is_plain(table, nn.Embedding) else table(buckets)
        return values.T


class MPNetModel(PackedModel):
    """An `MPNetModel` that runs on packed tokens."""

    def run(self, inputs: dict[str, Any], packing: Packing) -> Any:
        """Run on the stream, as transformers' does on a batch."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        module: Any = self
        embedded = module.embeddings(
            input_ids=inputs.get("input_ids"),
            position_ids=inputs["position_ids"],
            inputs_embeds=inputs.get("inputs_embeds"),
        )
        all_states = inputs.get("output_hidden_states")
        if all_states is None:
            all_states = module.config.output_hidden_states
        encoded = module.encoder(embedded, packing=packing, output_hidden_states=all_states)
        last = encoded.last_hidden_state
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=None if module.pooler is None else module.pooler(last),
            hidden_states=encoded.hidden_states,
        )


MPNET = Family(
    count_tokens,
    joins_tasks=False,
    drops_boundaries=True,
    layers={
        "MPNetEmbeddings": PlaceEmbeddings,
        "MPNetSelfAttention": MPNetSelfAttention,
        "MPNetAttention": MPNetAttention,
        "MPNetOutput": PostNorm,
    },
    model=MPNetModel,
    padded=MPNetEncoder,
    own_attention=True,
    whole_rows=True,
)
