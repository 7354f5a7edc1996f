"""Layers of transformers' BERTs on these kernels, for packed hidden states ``[1, T, H]``.

Each class stands in for one of transformers' (class_exchange.py) and uses the parameters of the
modules that it holds.  What one of these modules does is done without calling it only while it is
plain: torch's own class, without hooks.  An adapter in the place of a linear layer, a norm that
somebody watches, a parametrised weight: they are called.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.attention import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from ..dropout.dropout import dropout
from ..layer_norm.layer_norm import dropout_add_layer_norm
from ..linear.linear import joint_linear, linear
from ..task_gradients.task_layers import autocast_dtype
from .class_exchange import Exchanged
from .layer_norm_compat import FusedLayerNorm
from .transformers_packing import Packing


class Mask(NamedTuple):
    """What transformers' layers take as their attention mask; padding is known of the packing."""

    causal: bool


class LayerNorm(FusedLayerNorm):
    """Stands in for `torch.nn.LayerNorm`."""

    memory_efficient = False


class Dropout(nn.Dropout):
    """Stands in for `torch.nn.Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of ``input``, any shape, in training mode."""
        if not self.training or self.p == 0 or self.inplace or self.p == 1:
            return super().forward(input)
        return dropout(input, self.p)


# ---- attention ----------------------------------------------------------------------------------


def check_attention(mask: object, packing: Packing | None) -> tuple[Mask, Packing]:
    """Check that a layer's arguments come from an accelerated model.

    Raises:
        ValueError: they do not.
    """
    if packing is None or not isinstance(mask, Mask):
        raise ValueError(
            "attention: 'superbert' runs within an accelerated model alone; accelerate the model, "
            "where its config came from one, and call the model itself and not its parts"
        )
    return mask, packing


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: object,
    packing: Packing | None,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Attention on ``[T, heads, width]``, in autocast's dtype where it is on.

    A query that sees no token gives zeros, as in torch's attention.
    """
    mask, packing = check_attention(mask, packing)
    dtype = autocast_dtype(q) or q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    cu_seqlens_k = packing.cu_seqlens
    if packing.keys is not None:
        k, v, cu_seqlens_k = k[packing.keys], v[packing.keys], packing.cu_seqlens_k
    longest = packing.max_seqlen
    out = flash_attn_varlen_func(
        *(q, k, v, packing.cu_seqlens, cu_seqlens_k, longest, longest),
        *(dropout_p, scale, mask.causal),
        plan=packing.plan,
    )
    assert isinstance(out, Tensor)
    return out


class SelfAttention(Exchanged):
    """BERT's self-attention: one product gives queries, keys and values, which attention reads."""

    names = ("query", "key", "value")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        *_: object,
        packing: Packing | None = None,
        **__: object,
    ) -> tuple[Tensor, None]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, heads * width]``."""
        mask, packing = check_attention(attention_mask, packing)
        module: Any = self
        width, p = module.attention_head_size, module.dropout.p if self.training else 0.0
        layers = [getattr(self, name) for name in self.names]
        x = hidden_states[0]
        is_joint = all(is_plain(layer, nn.Linear) for layer in layers)
        has_bias = {layer.bias is not None for layer in layers} if is_joint else {True, False}
        if packing.keys is None and len(has_bias) == 1:
            weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
            qkv = joint_linear(x, weights, biases).unflatten(1, (3, -1, width))
            out = flash_attn_varlen_qkvpacked_func(
                qkv,
                packing.cu_seqlens,
                packing.max_seqlen,
                p,
                module.scaling,
                mask.causal,
                plan=packing.plan,
            )
            assert isinstance(out, Tensor)
        else:
            q, k, v = (layer(x).unflatten(1, (-1, width)) for layer in layers)
            out = attention(q, k, v, mask, packing, p, module.scaling)
        return out.flatten(1)[None], None


# ---- norms --------------------------------------------------------------------------


class PostNorm(Exchanged):
    """``LayerNorm(residual + dropout(dense(x)))`` in one product and one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Map ``[1, T, I]`` and the residual ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        return add_and_norm(
            hidden_states, input_tensor, module.dense, module.dropout, module.LayerNorm
        )


def add_and_norm(x: Tensor, residual: Tensor, dense: Any, drop: Any, norm: Any) -> Tensor:
    """Return ``norm(residual + drop(dense(x)))``, modules that are not plain being called."""
    if not (is_plain(norm, LayerNorm) and is_plain(drop, Dropout)):
        added: Tensor = norm(drop(dense(x)) + residual)
        return added
    is_linear = is_plain(dense, nn.Linear)
    product = linear(x, dense.weight) if is_linear else dense(x)
    out = dropout_add_layer_norm(
        product,
        residual,
        norm.weight,
        norm.bias,
        drop.p,
        norm.eps,
        x_bias=dense.bias if is_linear else None,
        training=drop.training,
    )
    assert isinstance(out, Tensor)
    return out


class SpanLogits(Exchanged):
    """The last layer of a question answering head: no answer begins or ends at padding."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, 2]``, the lowest number where hidden states are zeros."""
        logits: Tensor = super().forward(hidden_states)
        is_padding = ~hidden_states.any(-1, keepdim=True)
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class and nothing listens to its calls."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
