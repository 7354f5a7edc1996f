"""Puts these kernels into a BERT of transformers, in place, and takes them out again.

Attention goes through transformers' own registry (version 5): its mask function is asked once for
each forward pass, where the padded batch's tokens are found, and its attention function packs them,
attends, and pads the result.  Layer norms are replaced by modules that hold the same parameters.
"""

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .attention import flash_attn_varlen_func
from .layer_norm_doors import FusedLayerNorm
from .padding import pad_input, unpad_input

IMPLEMENTATION = "superbert"
# Encoders whose attention is BERT's and goes through the registry.
FAMILY = frozenset(
    {
        "albert",
        "bert",
        "bert-generation",
        "camembert",
        "data2vec-text",
        "distilbert",
        "electra",
        "ernie",
        "nomic_bert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "splinter",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)


class Replaced(NamedTuple):
    """What :func:`accelerate` replaced.

    Attributes:
        attention: names of the models whose attention runs on these kernels.
        layer_norms: names of the layer norms.
    """

    attention: tuple[str, ...]
    layer_norms: tuple[str, ...]


class _Undo(NamedTuple):
    implementations: list[tuple[Any, str]]
    layer_norms: list[tuple[nn.Module, str, nn.LayerNorm]]


class _Packing(NamedTuple):
    """Where the tokens of a padded batch are; passes through the model as its attention mask."""

    indices: Tensor  # [T] of [B * S]
    cu_seqlens: Tensor  # [B + 1]
    causal: bool


_accelerated: WeakKeyDictionary[nn.Module, _Undo] = WeakKeyDictionary()


def _packing(
    batch_size: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: object,
) -> _Packing:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError("attention: masks other than padding and causality are not supported")
    if attention_mask is None:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    stream = unpad_input(attention_mask, attention_mask, max_seqlen=kv_length)
    return _Packing(stream.indices, stream.cu_seqlens, mask_function is causal_mask_function)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Packing | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    output_attentions: bool = False,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention on ``[B, H, S, D]``; returns ``[B, S, H, D]``, zeros where there is padding."""
    if output_attentions:
        raise ValueError("output_attentions: the probabilities are never stored here")
    batch, _heads, length, _width = query.shape
    if key.shape != query.shape:
        raise ValueError("attention: keys of other lengths than the queries are not supported")
    if not isinstance(attention_mask, _Packing):
        raise ValueError("attention_mask: expected [batch, length]; other masks are not supported")
    indices, cu_seqlens, causal = attention_mask
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[indices] for x in (query, key, value))
    out = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, length, length, dropout, scaling, causal
    )
    assert isinstance(out, Tensor)
    return pad_input(out, indices, batch, length), None


def _replace_layer_norms(model: nn.Module) -> list[tuple[nn.Module, str, nn.LayerNorm]]:
    replaced = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.LayerNorm or len(child.normalized_shape) != 1:
                continue
            ours = FusedLayerNorm(child.normalized_shape, child.eps, child.elementwise_affine)
            ours.weight, ours.bias = child.weight, child.bias
            ours.train(child.training)
            setattr(parent, name, ours)
            replaced.append((parent, name, child))
    return replaced


def accelerate(model: nn.Module) -> Replaced:
    """Run a transformers BERT's attention and layer norms on these kernels, in place.

    Args:
        model: a BERT of transformers (see ``FAMILY``), or a module that holds one, such as a
            sentence-transformers model.

    Returns:
        The names of what was replaced, within ``model``.

    Raises:
        ValueError: no such BERT inside, one with cross attention, or it is accelerated already.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    if model in _accelerated:
        raise ValueError("model: accelerated already; `restore` it first")
    berts = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type in FAMILY
    }
    if not berts:
        raise ValueError(
            f"model: nothing to accelerate in a {type(model).__name__}; it holds no transformers "
            f"model of type {', '.join(sorted(FAMILY))}"
        )
    for name, bert in berts.items():
        if getattr(bert.config, "add_cross_attention", False):  # which not every config has
            raise ValueError(
                f"model: {name or type(bert).__name__} has cross attention, which is not supported"
            )
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _packing)
    undo = _Undo([], [])
    for bert in berts.values():
        undo.implementations.append((bert, bert.config._attn_implementation))
        bert.set_attn_implementation(IMPLEMENTATION)
    names = {id(module): name for name, module in model.named_modules()}
    undo.layer_norms.extend(_replace_layer_norms(model))
    _accelerated[model] = undo
    return Replaced(
        tuple(berts), tuple(names[id(module)] for _parent, _name, module in undo.layer_norms)
    )


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`.

    Args:
        model: the module that was given to it.

    Raises:
        ValueError: it was not accelerated.
    """
    undo = _accelerated.pop(model, None)
    if undo is None:
        raise ValueError("model: not accelerated")
    for bert, implementation in reversed(undo.implementations):
        bert.set_attn_implementation(implementation)
    for parent, name, module in undo.layer_norms:
        ours = getattr(parent, name)
        module.weight, module.bias = ours.weight, ours.bias  # which may be others by now
        module.train(ours.training)
        setattr(parent, name, module)
