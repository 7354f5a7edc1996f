"""Layers of transformers' BERTs on these kernels, for packed hidden states ``[1, T, H]``.

Each class stands in for one of transformers' (class_exchange.py) and uses the parameters of the
modules that it holds.  What one of these modules does is done without calling it only while it is
plain: torch's own class, without hooks.  An adapter in the place of a linear layer, a norm with a
hook, a parametrised weight: they are called.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as all_modules

from ..attention.attention import flash_attn_varlen_func, flash_attn_varlen_qkvpacked_func
from ..dropout.dropout import dropout
from ..layer_norm.layer_norm import dropout_add_layer_norm
from ..linear.linear import joint_linear
from ..task_gradients.task_layers import autocast_dtype
from .class_exchange import Exchanged, is_called_by_class
from .layer_norm_compat import FusedLayerNorm
from .transformers_models import PaddedEncoder
from .transformers_packing import Packing


class Mask(NamedTuple):
    """What transformers' layers take as their attention mask; padding is known of the packing.

    Attributes:
        causal: whether queries see no later keys.
        window: places to each side of its own that a query sees; None for all.
    """

    causal: bool
    window: int | None = None


MIN_FUSED_ELEMENTS = 2**15
"""Elements of hidden states from which these kernels are taken on a CPU.

With fewer, torch's embeddings, norms and dropouts take less time, since calls of these cost more:
8 tokens of width 384 take 4 times as long in this package's norm with residual as in torch's.
"""


def are_few(elements: int, like: Tensor) -> bool:
    """Whether torch's own calls take less time for tensors of so many elements, like this one."""
    return (
        not torch.compiler.is_compiling()  # first: a graph serves any number of tokens
        and elements < MIN_FUSED_ELEMENTS
        and like.is_cpu
        and like.dtype == torch.float32
    )


class LayerNorm(FusedLayerNorm):
    """Stands in for `torch.nn.LayerNorm`."""

    memory_efficient = False

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last dimension of ``[..., N]``, any floating dtype."""
        weight, bias = self.weight, self.bias
        is_alike = weight is None or weight.dtype == input.dtype
        if is_alike and are_few(input.numel(), input):
            return functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)
        return super().forward(input)


class Dropout(nn.Dropout):
    """Stands in for `torch.nn.Dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of ``input``, any shape, in training mode."""
        is_usual = self.training and 0 < self.p < 1 and not self.inplace
        if not is_usual or are_few(input.numel(), input):
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
    window = (-1, -1)
    if mask.window is not None and packing.length - 1 > mask.window:
        if packing.has_gaps:
            return windowed_attention(q, k, v, mask.window, packing, dropout_p, scale)
        window = (mask.window, mask.window)
    elif is_faster_padded((q, k, v), packing, dropout_p):
        return padded_attention(q, k, v, packing, mask.causal, scale)
    cu_seqlens_k = packing.cu_seqlens
    if packing.keys is not None:
        k, v, cu_seqlens_k = k[packing.keys], v[packing.keys], packing.cu_seqlens_k
    longest = packing.max_seqlen
    out = flash_attn_varlen_func(
        *(q, k, v, packing.cu_seqlens, cu_seqlens_k, longest, longest),
        *(dropout_p, scale, mask.causal, window),
        plan=packing.plan,
    )
    assert isinstance(out, Tensor)
    return out


MIN_PADDED_LENGTH = 128
"""Tokens of a sequence from which torch's attention in bfloat16 is taken on some CPUs.

On a CPU with AMX, transformers with torch's attention was measured at 15 ms a layer for 8 sequences
of 512 where these kernels, which compute in float32, took 29; of its time a whole model here took
1.47 then, and 1.10 with 64 sequences of 16, where attention is little of it.  The bound lies
between and was not measured itself, nor was what is gained above it.
"""


@torch.compiler.assume_constant_result
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def is_faster_padded(tensors: tuple[Tensor, ...], packing: Packing, dropout_p: float) -> bool:
    """Whether attention on these tensors is torch's: without padding, gradients and dropout."""
    first = tensors[0]
    return (
        packing.indices is None
        and first.dtype == torch.bfloat16
        and first.device.type == "cpu"
        and dropout_p == 0
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and multiplies_bf16()
        and packing.length >= MIN_PADDED_LENGTH
    )


def padded_attention(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, causal: bool, scale: float | None
) -> Tensor:
    """Torch's attention on views of a stream without padding; all are ``[T, heads, width]``."""
    shape = (packing.batch_size, packing.length)
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    packing: Packing,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Attention to keys at most ``window`` places away, where padding lies between tokens.

    Those places count, so that it is computed on padded tensors.

    Args:
        q: ``[T, heads, width]``, likewise k and v.
        k: see q.
        v: see q.
        window: places to each side.
        packing: of the stream.
        dropout_p: probability to drop a probability.
        scale: of the products; None for ``width ** -0.5``.

    Returns:
        ``[T, heads, width]``, zeros for a query that sees no token.
    """
    places = torch.arange(packing.length, device=q.device)
    is_near = (places[:, None] - places).abs() <= window
    attend = functional.scaled_dot_product_attention
    q, k, v = (packing.pad(x[None]).transpose(1, 2) for x in (q, k, v))
    sees = is_near & packing.is_token()[:, None, None]
    # Not every kernel of torch's has a gradient where nothing is seen.
    sees_none = ~sees.any(-1, keepdim=True)
    out = attend(q, k, v, sees | sees_none, dropout_p, scale=scale)
    return packing.pack(out.masked_fill(sees_none, 0).transpose(1, 2)).squeeze(0)


class SelfAttention(Exchanged):
    """BERT's self-attention: one product gives queries, keys and values, which attention reads.

    Attributes:
        projections: names of the linear layers that make queries, keys and values.
        probability_dropout: name of the dropout of attention probabilities.
    """

    projections = ("query", "key", "value")
    probability_dropout = "dropout"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        *_: object,
        packing: Packing | None = None,
        **__: object,
    ) -> tuple[Tensor, None]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, heads * width]``."""
        return self.attend(hidden_states, attention_mask, packing), None

    def attend(
        self, hidden_states: Tensor, attention_mask: object, packing: Packing | None
    ) -> Tensor:
        """Return the heads' outputs, side by side, ``[1, T, heads * width]``."""
        mask, packing = check_attention(attention_mask, packing)
        module: Any = self
        width, scale = module.attention_head_size, module.scaling
        p = dropout_of(getattr(self, self.probability_dropout), self.training)
        layers = [getattr(self, name) for name in self.projections]
        x = hidden_states.squeeze(0)
        qkv = None if packing.keys is not None else joint_product(x, layers)
        if qkv is not None and is_faster_padded((qkv,), packing, p):
            q, k, v = qkv.unflatten(1, (3, -1, width)).unbind(1)
            out = padded_attention(q, k, v, packing, mask.causal, scale)
        elif qkv is not None:
            packed = flash_attn_varlen_qkvpacked_func(
                *(qkv.unflatten(1, (3, -1, width)), packing.cu_seqlens, packing.max_seqlen),
                *(p, scale, mask.causal),
                plan=packing.plan,
            )
            assert isinstance(packed, Tensor)
            out = packed
        else:
            q, k, v = (layer(x).unflatten(1, (-1, width)) for layer in layers)
            out = attention(q, k, v, mask, packing, p, scale)
        return out.flatten(1)[None]


def dropout_of(drop: nn.Module, training: bool) -> float:
    """Return the probability of a dropout of attention probabilities, which is never called."""
    return drop.p if training and isinstance(drop, nn.Dropout) else 0.0


def joint_product(x: Tensor, layers: list[Any]) -> Tensor | None:
    """Return the outputs ``[T, 3 H]`` of three linear layers on ``x [T, H]``, side by side.

    None where one is not plain, has a weight of another kind (as quantization gives it), or not all
    have a bias or all none.
    """
    if not all(is_plain(layer, nn.Linear) for layer in layers):
        return None
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    if any(type(weight) not in (nn.Parameter, Tensor) for weight in weights):
        return None
    if len({bias is None for bias in biases}) != 1:
        return None
    return joint_linear(x, weights, biases)


def products(x: Tensor, layers: list[Any]) -> Tensor:
    """Return the same of layers of any kind, which are called where they are not plain."""
    qkv = joint_product(x, layers)
    return torch.cat([layer(x) for layer in layers], 1) if qkv is None else qkv


# ---- norms --------------------------------------------------------------------------------------


class PostNorm(Exchanged):
    """``LayerNorm(residual + dropout(dense(x)))`` in one product and one pass."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Map ``[1, T, I]`` and the residual ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        return add_and_norm(
            hidden_states, input_tensor, module.dense, module.dropout, module.LayerNorm
        )


def add_and_norm(x: Tensor, residual: Tensor, dense: Any, drop: Any, norm: Any) -> Tensor:
    """Return ``norm(residual + drop(dense(x)))``, modules that are not plain being called.

    Without ``dense`` or ``drop``, None, their input goes on as it is.
    """
    is_ours = is_plain(norm, LayerNorm)
    if drop is not None:
        is_ours = is_ours and is_plain(drop, Dropout) and drop.p < 1
    if not is_ours or are_few(residual.numel(), residual):
        product = x if dense is None else dense(x)
        added: Tensor = norm((product if drop is None else drop(product)) + residual)
        return added
    is_linear = dense is not None and is_plain(dense, nn.Linear)
    product = x
    if dense is not None:
        product = functional.linear(x, dense.weight) if is_linear else dense(x)
    out = dropout_add_layer_norm(
        product,
        residual,
        norm.weight,
        norm.bias,
        0.0 if drop is None else drop.p,
        norm.eps,
        x_bias=dense.bias if is_linear else None,
        training=drop is not None and drop.training,
    )
    assert isinstance(out, Tensor)
    return out


# ---- layers whose norms are their own -----------------------------------------------------------


class DistilBertAttention(SelfAttention):
    """Self-attention with the linear layer behind it."""

    projections = ("q_lin", "k_lin", "v_lin")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        *_: object,
        packing: Packing | None = None,
        **__: object,
    ) -> tuple[Tensor, None]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        return module.out_lin(self.attend(hidden_states, attention_mask, packing)), None


class DistilBertFeedForward(Exchanged):
    """Marks transformers' feed-forward network, whose steps :class:`DistilBertBlock` may take."""


class DistilBertBlock(Exchanged):
    """DistilBERT's layer, each norm with what is added before it in one pass."""

    def forward(
        self, hidden_states: Tensor, attention_mask: object = None, **kwargs: object
    ) -> Tensor:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        attended, _ = module.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        attended = add_and_norm(attended, hidden_states, None, None, module.sa_layer_norm)
        ffn, norm = module.ffn, module.output_layer_norm
        if ffn.chunk_size_feed_forward or not is_unwatched(ffn, DistilBertFeedForward):
            return add_and_norm(ffn(attended), attended, None, None, norm)
        inner = ffn.activation(ffn.lin1(attended))
        return add_and_norm(inner, attended, ffn.lin2, ffn.dropout, norm)


class AlbertAttention(SelfAttention):
    """Self-attention with the linear layer, the residual and the norm behind it."""

    probability_dropout = "attention_dropout"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        *_: object,
        packing: Packing | None = None,
        **__: object,
    ) -> tuple[Tensor, None]:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        attended = self.attend(hidden_states, attention_mask, packing)
        last = (module.dense, module.output_dropout, module.LayerNorm)
        return add_and_norm(attended, hidden_states, *last), None


class AlbertLayer(Exchanged):
    """ALBERT's layer, the last product, residual and norm as one."""

    def forward(
        self, hidden_states: Tensor, attention_mask: object = None, **kwargs: object
    ) -> Tensor:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        if module.chunk_size_feed_forward:
            chunked: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return chunked
        attended, _ = module.attention(hidden_states, attention_mask, **kwargs)
        inner = module.activation(module.ffn(attended))
        return add_and_norm(inner, attended, module.ffn_output, None, module.full_layer_layer_norm)


class NomicBertLayer(Exchanged):
    """NomicBERT's layer, each dropout, residual and norm in one pass."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: object = None,
        position_embeddings: object = None,
        **kwargs: object,
    ) -> Tensor:
        """Map hidden states ``[1, T, H]`` to ``[1, T, H]``."""
        module: Any = self
        attended, _ = module.self_attn(
            hidden_states,
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        drop, norm = module.post_attention_dropout, module.post_attention_layernorm
        attended = add_and_norm(attended, hidden_states, None, drop, norm)
        drop, norm = module.post_mlp_dropout, module.post_mlp_layernorm
        return add_and_norm(module.mlp(attended), attended, None, drop, norm)


class LastNomicBertLayer(PaddedEncoder, NomicBertLayer):  # type: ignore[misc]
    """The same, its hidden states padded."""


# ---- heads --------------------------------------------------------------------------------------


class SpanStates(Exchanged):
    """What a question answering head makes of hidden states: zeros of zeros."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, H]``."""
        states: Tensor = super().forward(hidden_states)
        return states.masked_fill(~hidden_states.any(-1, keepdim=True), 0)


class SpanLogits(Exchanged):
    """The last layer of a question answering head: no answer begins or ends at padding."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``[B, S, H]`` to ``[B, S, 2]``, the lowest number where hidden states are zeros."""
        logits: Tensor = super().forward(hidden_states, *args, **kwargs)
        is_padding = ~hidden_states.any(-1, keepdim=True)
        return logits.masked_fill(is_padding, torch.finfo(logits.dtype).min)


# ---- plain modules ------------------------------------------------------------------------------


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class and nothing listens to its calls."""
    return type(module) is kind and is_unwatched(module, kind)


def is_unwatched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this class, or one made of it, and a call would run that code alone.

    A hook, of the module or of all modules, and a forward pass set on the module are called.
    """
    return (
        isinstance(module, kind)
        and is_called_by_class(module)
        # Asked of three modules at each norm: written out, not in a loop.
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks)
        and not (all_modules._global_backward_hooks or all_modules._global_backward_pre_hooks)
    )
