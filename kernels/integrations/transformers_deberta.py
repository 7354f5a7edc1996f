"""DeBERTa (versions 2 and 3) on packed tokens.

Its attention adds to the scores what contents and relative positions make of each other, and masks
queries at padding as it masks keys: they see all places alike.  So rows that begin with padding,
whose first place is an output, are computed whole.

Transformers' DeBERTa neither looks up its attention in the registry nor hands arguments on, so that
the model and its encoder have forward passes of their own here.  Layers get an
:class:`AttentionMask`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .class_exchange import Exchanged
from .transformers_layers import PostNorm, dropout_of, products
from .transformers_models import Family, PackedModel
from .transformers_packing import Packing


class AttentionMask(NamedTuple):
    """What DeBERTa's layers take as their attention mask.

    Attributes:
        packing: of the stream.
        pairs: bool ``[B, 1, S, S]``, whether query and key are both tokens.
    """

    packing: Packing
    pairs: Tensor


def disentangled_attention(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    relative_positions: Tensor | None,
    position_states: Tensor | None,
) -> Tensor:
    """DeBERTa's attention, on padded tensors.

    Args:
        module: transformers' self-attention, which makes scores of relative positions.
        q: ``[T, heads, width]``, likewise k and v.
        k: see q.
        v: see q.
        mask: of the stream.
        relative_positions: int64 ``[1, S, S]``, or None without them.
        position_states: embeddings of relative positions ``[P, H]``, or None.

    Returns:
        ``[T, heads, width]``.
    """
    packing, heads = mask.packing, q.shape[1]
    padded = (packing.pad(x[None]).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    padded_q, padded_k, padded_v = padded
    factor = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
    scores = padded_q @ (padded_k.transpose(1, 2) / math.sqrt(q.shape[2] * factor))
    if module.relative_attention:
        scores = scores + module.disentangled_attention_bias(
            *(padded_q, padded_k, relative_positions, module.pos_dropout(position_states), factor)
        )
    scores = scores.unflatten(0, (-1, heads))
    scores = scores.masked_fill(~mask.pairs, torch.finfo(q.dtype).min)
    p = dropout_of(module.dropout, module.dropout.training)
    probabilities = functional.dropout(scores.softmax(-1), p).to(v.dtype)
    out = (probabilities.flatten(0, 1) @ padded_v).unflatten(0, (-1, heads))
    return packing.pack(out.transpose(1, 2))[0]


class DisentangledSelfAttention(Exchanged):
    """DeBERTa's self-attention: one product gives queries, keys and values."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, heads * width]``."""
        if not isinstance(attention_mask, AttentionMask) or query_states is not None:
            raise ValueError(
                "attention_mask: layers of an accelerated DeBERTa run within the model alone; call "
                "the model itself and not its parts"
            )
        assert not output_attentions  # which the model refuses
        module: Any = self
        x, width = hidden_states[0], module.attention_head_size
        layers = [module.query_proj, module.key_proj, module.value_proj]
        qkv = products(x, layers)
        q, k, v = qkv.unflatten(1, (3, -1, width)).unbind(1)
        out = disentangled_attention(module, q, k, v, attention_mask, relative_pos, rel_embeddings)
        return out.flatten(1)[None], None


class DebertaV2Encoder(Exchanged):
    """DeBERTa's layers."""

    def forward(
        self, hidden_states: Tensor, packing: Packing | None = None, *_: object, **__: object
    ) -> list[Tensor]:
        """Return the hidden states ``[1, T, H]`` of the embeddings and of every layer."""
        if not isinstance(packing, Packing):
            raise ValueError(
                "packing: the encoder of an accelerated DeBERTa runs within the model alone; call "
                "the model itself and not its parts"
            )
        module: Any = self
        is_token = packing.is_token()[:, None]
        mask = AttentionMask(packing, (is_token[..., None] & is_token[:, :, None]))
        relative_positions = module.get_rel_pos(hidden_states.new_empty(1, packing.length, 0))
        position_states = module.get_rel_embedding()
        states = [hidden_states]
        for i, layer in enumerate(module.layer):
            # By place, since reentrant checkpoints see no gradients of other arguments.
            state = layer(states[-1], mask, None, relative_positions, position_states)[0]
            if i == 0 and module.conv is not None:
                padded = (packing.pad(x) for x in (hidden_states, state))
                state = packing.pack(module.conv(*padded, packing.is_token().long()))
            states.append(state)
        return states


class DebertaV2Model(PackedModel):
    """A `DebertaV2Model` that runs on packed tokens."""

    def run(self, inputs: dict[str, Any], packing: Packing) -> Any:
        """Run on the stream, as transformers' does on a batch."""
        from transformers.modeling_outputs import BaseModelOutput

        module: Any = self
        names = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
        embedded = module.embeddings(
            **{name: inputs.get(name) for name in names},
            mask=None if packing.keys is None else packing.pack(packing.is_token()),
        )
        states = module.encoder(embedded, packing)
        all_states = inputs.get("output_hidden_states")
        if all_states is None:
            all_states = module.config.output_hidden_states
        return BaseModelOutput(
            last_hidden_state=states[-1], hidden_states=tuple(states) if all_states else None
        )


DEBERTA_V2 = Family(
    joins_tasks=False,
    drops_boundaries=True,
    encoder=None,
    layers={
        "DisentangledSelfAttention": DisentangledSelfAttention,
        "DebertaV2SelfOutput": PostNorm,
        "DebertaV2Output": PostNorm,
        "DebertaV2Encoder": DebertaV2Encoder,
    },
    model=DebertaV2Model,
    own_attention=True,
    whole_rows=True,
)
