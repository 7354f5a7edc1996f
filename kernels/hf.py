"""Puts these kernels into a BERT of transformers, in place, and takes them out again.

Attention goes through transformers' own registry (version 5).  Its mask function is asked once for
each forward pass, where the padded batch's tokens are found; its attention function packs keys and
values.  Every query attends, those of padding too: heads may read hidden states there, so they are
what transformers makes of them.  Layer norms stay the modules that they are, of another class.

All that :func:`restore` has to know lies in the model itself, so copies and pickles carry it along.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .attention import flash_attn_varlen_func
from .layer_norm_doors import FusedLayerNorm
from .padding import pad_input, unpad_input
from .task_layers import autocast_dtype

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


class _Implementation(str):
    """The name of this attention in a model's config; unpickling it registers the attention.

    Attributes:
        replaced: the name that it stands in for.
    """

    __slots__ = ("replaced",)
    replaced: str

    def __new__(cls, replaced: str) -> Self:
        name = super().__new__(cls, IMPLEMENTATION)
        name.replaced = replaced
        return name

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (self.replaced,)


class _LayerNorm(FusedLayerNorm):
    """The class of a `torch.nn.LayerNorm` while it runs on these kernels."""

    memory_efficient = False


# ---- attention ----------------------------------------------------------------------------------


class _Queries(NamedTuple):
    """Queries that see their sequence's tokens in the same manner."""

    indices: Tensor | None  # [Q] of [B * S]; None for all
    cu_seqlens: Tensor  # [B + 1]
    causal: bool


class _Packing(NamedTuple):
    """Where the tokens of a padded batch are; passes through the model as its attention mask."""

    indices: Tensor | None  # [T] of [B * S]; None for all
    cu_seqlens: Tensor  # [B + 1]
    queries: tuple[_Queries, ...]


def _packing(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: object,
) -> _Packing:
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError("attention: masks other than padding and causality are not supported")
    if q_length != kv_length:
        raise ValueError("attention: keys of other lengths than the queries are not supported")
    causal = mask_function is causal_mask_function
    full = kv_length * torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    if attention_mask is None:
        return _Packing(None, full, (_Queries(None, full, causal),))
    tokens = unpad_input(attention_mask, attention_mask, max_seqlen=kv_length)
    queries = _causal_queries(attention_mask != 0) if causal else (_Queries(None, full, False),)
    return _Packing(tokens.indices, tokens.cu_seqlens, queries)


def _causal_queries(is_token: Tensor) -> tuple[_Queries, ...]:
    """Divide the queries of a decoder, ``is_token`` ``[B, S]``, by what they see.

    The kernels align queries and keys at their ends.  So the queries up to the last token are
    causal, also those of padding before the first, which see nothing; those behind see all tokens.
    """
    first = is_token & ~nn.functional.pad(is_token, (1, 0))[:, :-1]
    if (first.sum(1) > 1).any():
        raise ValueError(
            "attention_mask: padding between tokens is not supported in a decoder, expected it "
            "before the first or behind the last"
        )
    behind = is_token.flip(1).cumsum(1).flip(1) == 0
    parts = ((unpad_input(part, part), part is not behind) for part in (~behind, behind))
    return tuple(_Queries(part.indices, part.cu_seqlens, causal) for part, causal in parts)


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
    """Attention on ``[B, H, S, D]``, in autocast's dtype where it is on; returns ``[B, S, H, D]``.

    A query that sees no token gives zeros, as in torch's attention.
    """
    if output_attentions:
        raise ValueError("output_attentions: the probabilities are never stored here")
    batch, _heads, length, _width = query.shape
    if key.shape != query.shape:
        raise ValueError("attention: keys of other lengths than the queries are not supported")
    if not isinstance(attention_mask, _Packing):
        raise ValueError("attention_mask: expected [batch, length]; other masks are not supported")
    indices, cu_seqlens, queries = attention_mask
    q, k, v = (
        x.to(autocast_dtype(x) or x.dtype).transpose(1, 2).flatten(0, 1)
        for x in (query, key, value)
    )
    k, v = _taken(k, indices), _taken(v, indices)
    out = q.new_zeros(())
    for part in queries:
        rows = flash_attn_varlen_func(
            *(_taken(q, part.indices), k, v, part.cu_seqlens, cu_seqlens, length, length),
            *(dropout, scaling, part.causal),
        )
        assert isinstance(rows, Tensor)
        if part.indices is None:
            return rows.unflatten(0, (batch, length)), None
        out = out + pad_input(rows, part.indices, batch, length)
    return out, None


def _taken(rows: Tensor, indices: Tensor | None) -> Tensor:
    return rows if indices is None else rows[indices]


# ---- registration -------------------------------------------------------------------------------


def _register() -> None:
    """Make the attention known to transformers; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _packing)


def _registered(replaced: str) -> _Implementation:
    _register()
    return _Implementation(replaced)


# Configs may name this attention already.  Where transformers comes later, or is just on its way
# in, `accelerate` or an accelerated model's pickle registers.
if hasattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface"):
    _register()


# ---- public -------------------------------------------------------------------------------------


def accelerate(model: nn.Module) -> Replaced:
    """Run a transformers BERT's attention and layer norms on these kernels, in place.

    All outputs stay what transformers gives (its "sdpa" attention), at padding as well, for every
    head.  Each BERT gets a config of its own, since others that share it are left alone.  What runs
    on these kernels already, such as a child that was accelerated before its parent, stays so.

    A copy, a pickle and what `torch.save` makes of the model stay accelerated, in other processes
    too.  ``save_pretrained`` writes a plain model.

    Args:
        model: a BERT of transformers (see ``FAMILY``), or a module that holds one, such as a
            sentence-transformers model.

    Returns:
        The names of what was replaced, within ``model``.

    Raises:
        ValueError: no such BERT inside, one with cross attention or with an attention of its own
            code, or all is accelerated already.
    """
    from transformers import PreTrainedModel

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
    _register()
    attention = {
        name: bert
        for name, bert in berts.items()
        if bert.config._attn_implementation != IMPLEMENTATION
    }
    norms = {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    }
    if not attention and not norms:
        raise ValueError("model: accelerated already; `restore` it first")
    for name, bert in attention.items():
        if bert.config._attn_implementation == IMPLEMENTATION:
            continue  # it shares its config with one before
        _give_own_config(model, bert)
        bert.set_attn_implementation(_Implementation(bert.config._attn_implementation))
        if bert.config._attn_implementation != IMPLEMENTATION:
            _undo(model)
            raise ValueError(
                f"model: {name or type(bert).__name__} has an attention of its own code, which "
                "cannot be replaced"
            )
    for norm in norms.values():
        norm.__class__ = _LayerNorm
    return Replaced(tuple(attention), tuple(norms))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate` in a model and all that it holds.

    Args:
        model: the module that was given to it, a copy, a parent or a child.

    Raises:
        ValueError: nothing in it is accelerated.
    """
    if not _undo(model):
        raise ValueError("model: not accelerated")


def _undo(model: nn.Module) -> bool:
    """Put back what was there; return whether anything had been replaced."""
    found = False
    for module in model.modules():
        if type(module) is _LayerNorm:
            module.__class__ = nn.LayerNorm  # type: ignore[assignment]
            found = True
        config: Any = vars(module).get("config")
        name = getattr(config, "_attn_implementation", None)
        if name == IMPLEMENTATION:
            # A config that was given this name by hand does not say what it replaced.
            config._attn_implementation = getattr(name, "replaced", "sdpa")
            found = True
    return found


def _give_own_config(model: nn.Module, bert: nn.Module) -> None:
    """Give a BERT inside ``model``, and what shares its config there, a copy of it."""
    shared, own = bert.config, copy.deepcopy(bert.config)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
