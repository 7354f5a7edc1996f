"""MPNet on packed tokens.

A bias for the distance of query and key, one for each head, is added to the scores:

    P_h = softmax(Q_h K_h^T / sqrt(width) + bias_h[place of key - place of query])

Transformers' MPNet neither looks up its attention in the registry nor hands arguments on, so that
the model and its encoder have forward passes of their own here.  Layers get the packing, with what
is added to the scores of padding, as their attention mask.

The encoder looks the biases up once for all layers, ``[heads, 2 S - 1]`` of the distances in a row
of S places, so that their gradient is summed over rows and layers before it goes back to the table.
On a CPU attention runs on the stream and adds them (`relative_attention`).  On a GPU, and where a
row has padding between its tokens or before them, it runs on padded tensors: scores ``[B, heads, S,
S]`` get biases, a matrix ``[1, heads, S, S]``, and padding in place.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..attention.relative_attention import relative_attention
from ..registration.differentiation import in_forward_mode
from ..registration.validation import KERNEL_DTYPES
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


class Mask(NamedTuple):
    """What the layers take as their attention mask.

    Attributes:
        packing: of the stream.
        is_packed: whether attention runs on the stream.
        padding: ``[B, 1, 1, S]``, zeros for tokens and the lowest number for padding, to be added
            to the scores; None where all places are tokens, and where the biases have it in them.
        is_fused: whether torch's attention is taken where no probability is dropped.
    """

    packing: Packing
    is_packed: bool = False
    padding: Tensor | None = None
    is_fused: bool = False


def biased_attention(
    qkv: Tensor, bias: Tensor, mask: Mask, dropout_p: float, scale: float
) -> Tensor:
    """Attention with biases, on padded tensors.

    Rows without any token see all of their places alike, as in transformers.

    Args:
        qkv: queries, keys and values ``[T, 3, heads, width]``.
        bias: ``[1, heads, S, S]`` or ``[B, heads, S, S]``, any floating dtype; S is
            ``packing.length``.
        mask: of the stream.
        dropout_p: probability to drop a probability.
        scale: of the products.

    Returns:
        ``[T, heads, width]``.
    """
    packing, _, padding, is_fused = mask
    q, k, v = packing.pad(qkv[None]).permute(2, 0, 3, 1, 4).unbind()
    if is_fused and dropout_p == 0:
        # Measured at 0.76 to 0.95 of the time of the steps below on a CPU; with a gradient for the
        # biases torch takes the same steps.
        out = functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    else:
        scores = (q * scale) @ k.transpose(-1, -2)
        scores = scores.to(torch.promote_types(scores.dtype, bias.dtype)).add_(bias)
        if padding is not None:
            # Added, and not put in place of scores, which so have gradients in rows without tokens.
            scores.add_(padding)
        probabilities = scores.softmax(-1).to(v.dtype)
        if dropout_p > 0:
            probabilities = functional.dropout(probabilities, dropout_p)
        out = probabilities @ v
    return packing.pack(out.transpose(1, 2)).squeeze(0)


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
            attention_mask: its :class:`Mask`.
            position_bias: that of :meth:`MPNetEncoder.mask_and_bias`.
            _: what transformers' layers hand on besides.
        """
        module: Any = self
        return (module.o(self.attend(hidden_states, attention_mask, position_bias)),)

    def attend(self, hidden_states: Tensor, mask: object, bias: Tensor | None) -> Tensor:
        """Return the heads' outputs, side by side, ``[1, T, heads * width]``."""
        if not isinstance(mask, Mask) or bias is None:
            raise ValueError(
                "attention_mask: layers of an accelerated MPNet run within the model alone; call "
                "the model itself and not its parts"
            )
        module: Any = self
        width = module.attention_head_size
        qkv = products(hidden_states.squeeze(0), [module.q, module.k, module.v])
        qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype).unflatten(1, (3, -1, width))
        p, scale = dropout_of(module.dropout, module.dropout.training), 1 / math.sqrt(width)
        if mask.is_packed:
            boundaries = mask.packing.cu_seqlens, mask.packing.max_seqlen
            out = relative_attention(qkv, bias, *boundaries, p, scale)
        else:
            out = biased_attention(qkv, bias, mask, p, scale)
        return out.flatten(1)[None]


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
        mask, bias = self.mask_and_bias(hidden_states, packing)
        states = [hidden_states]
        for layer in module.layer:
            states.append(layer(states[-1], mask, bias)[0])
        return BaseModelOutput(
            last_hidden_state=packing.pad(packing.cleared(states[-1])),
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def mask_and_bias(self, hidden_states: Tensor, packing: Packing) -> tuple[Mask, Tensor]:
        """Return what all layers add to their scores.

        The biases are those of :func:`relative_attention` where the mask says that attention runs
        on the stream, and else those of :func:`biased_attention`.
        """
        values = self.biases_of_distances(packing.length, hidden_states.device)
        dtype = autocast_dtype(hidden_states) or hidden_states.dtype
        if _runs_on_the_stream(hidden_states.device, dtype, packing):
            return Mask(packing, is_packed=True), values.float()
        # Row i of the matrix is S entries from S - 1 - i on.
        bias = values.unfold(1, packing.length, 1).flip(1)[None]
        # Passes without gradients in training mode are those of checkpoints, to be repeated so.
        is_fused = not (self.training or torch.is_grad_enabled() or in_forward_mode())
        if is_fused:
            bias = bias.to(dtype)
        if packing.indices is None:
            return Mask(packing, is_fused=is_fused), bias
        is_padding = ~packing.is_token()[:, None, None]
        dtype = torch.promote_types(dtype, bias.dtype)
        lowest = torch.finfo(dtype).min
        # Scores of padding are to round to the lowest number, also in rows of padding alone.
        # float16's and a score do not, and NaN was reported of CUDA's fused attention there (issue
        # 110213 of PyTorch).
        if is_fused and bias.is_cpu and dtype != torch.float16:
            return Mask(packing, is_fused=True), bias.masked_fill(is_padding, lowest)
        zeros = torch.zeros_like(is_padding, dtype=dtype)
        return Mask(packing, padding=zeros.masked_fill(is_padding, lowest)), bias

    def biases_of_distances(self, length: int, device: torch.device) -> Tensor:
        """Return the biases ``[heads, 2 S - 1]`` of the distances from -(S - 1) to S - 1."""
        module: Any = self
        distances = torch.arange(1 - length, length, device=device)
        buckets = module.relative_position_bucket(distances)
        table = module.relative_attention_bias
        # Not by torch's embedding: these are no tokens, for whose tasks it would be taken.
        values: Tensor = table.weight[buckets] if is_plain(table, nn.Embedding) else table(buckets)
        return values.T.contiguous()


def _runs_on_the_stream(device: torch.device, dtype: torch.dtype, packing: Packing) -> bool:
    """Whether attention can run on the stream, whose places are those of the rows."""
    has_kernel = device.type == "cpu" and dtype in KERNEL_DTYPES and not in_forward_mode()
    return has_kernel and packing.keys is None and not packing.has_gaps


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
