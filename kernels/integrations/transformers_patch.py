"""Make a BERT of transformers use these kernels, in place, and undo that.

Attention goes through transformers' own registry (version 5).  Its mask function is called once in
each forward pass and finds the tokens of the padded batch; its attention function packs keys and
values.  Queries of padding attend too, since heads may read their hidden states: these are the same
as with transformers' attention.  Layer norms stay the same modules and get another class.

The model itself stores everything that :func:`restore` needs, so copies and pickles have it too.
"""

import copy
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention.attention import flash_attn_varlen_func
from ..task_gradients.task_layers import autocast_dtype
from .layer_norm_compat import FusedLayerNorm
from .padding import Unpadded, pad_input, unpad_input

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
    """Modules that :func:`accelerate` replaced.

    Attributes:
        attention: names of the models whose attention runs on these kernels.
        layer_norms: names of the layer norms.
    """

    attention: tuple[str, ...]
    layer_norms: tuple[str, ...]


class _AttentionBefore(str):
    """The name of a module's attention before :func:`accelerate`; unpickling it registers ours."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (str(self),)


class _LayerNorm(FusedLayerNorm):
    """The class of a `torch.nn.LayerNorm` while it runs on these kernels."""

    memory_efficient = False


# ---- attention ----------------------------------------------------------------------------------


class _Queries(NamedTuple):
    """The queries of a batch that are causal, or those that are not."""

    indices: Tensor | None  # [Q] of [B * S]; None for all
    cu_seqlens: Tensor  # [B + 1]
    causal: bool


class _Packing(NamedTuple):
    """Positions of the tokens of a padded batch; the model takes it as its attention mask."""

    length: int  # S
    indices: Tensor | None  # [T] of [B * S]; None for all
    cu_seqlens: Tensor  # [B + 1]
    queries: tuple[_Queries, ...]


_PADDING_BETWEEN = (
    "attention_mask: padding between tokens is not supported in a decoder, expected it before the "
    "first or behind the last"
)


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
    causal = mask_function is causal_mask_function
    # Whether keys are as many as queries, `_attend` checks on their tensors: of two equal numbers
    # Inductor may pass one to a graph and compute with the other's name.
    full = q_length * torch.arange(batch_size + 1, dtype=torch.int32, device=device)
    if attention_mask is None:
        return _Packing(kv_length, None, full, (_Queries(None, full, causal),))
    is_token = attention_mask != 0
    tokens = _places(is_token)
    queries = _causal_queries(is_token) if causal else (_Queries(None, full, False),)
    return _Packing(kv_length, tokens.indices, tokens.cu_seqlens, queries)


def _places(is_token: Tensor) -> Unpadded:
    """Find the tokens of ``[B, S]``.

    In a compiled graph, whose shapes cannot depend on values, the result has all ``B * S`` rows,
    tokens first; attention ignores the others.
    """
    total = is_token.numel() if torch.compiler.is_compiling() else None
    return unpad_input(is_token, is_token, total=total, max_seqlen=is_token.shape[1])


def _causal_queries(is_token: Tensor) -> tuple[_Queries, ...]:
    """Divide the queries of a decoder, ``is_token`` ``[B, S]``, into causal and other ones.

    The kernels align queries and keys at their ends.  So the queries up to the last token are
    causal, and those of padding before the first token see none; queries of padding after the last
    token see all tokens.
    """
    first = is_token & ~nn.functional.pad(is_token, (1, 0))[:, :-1]
    in_one_piece = (first.sum(1) <= 1).all()
    if torch.compiler.is_compiling():
        torch._assert_async(in_one_piece, _PADDING_BETWEEN)
    elif not in_one_piece:
        raise ValueError(_PADDING_BETWEEN)
    behind = is_token.flip(1).cumsum(1).flip(1) == 0
    divided = ((_places(is_query), is_query is not behind) for is_query in (~behind, behind))
    return tuple(_Queries(own.indices, own.cu_seqlens, causal) for own, causal in divided)


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
    if not isinstance(attention_mask, _Packing):
        raise ValueError("attention_mask: expected [batch, length]; other masks are not supported")
    mask_length, indices, cu_seqlens, queries = attention_mask
    if key.shape != query.shape or mask_length != length:
        raise ValueError("attention: keys of other lengths than the queries are not supported")
    q, k, v = (
        x.to(autocast_dtype(x) or x.dtype).transpose(1, 2).flatten(0, 1)
        for x in (query, key, value)
    )
    k, v = _selected(k, indices), _selected(v, indices)
    out = q.new_zeros(())
    for own in queries:
        rows = flash_attn_varlen_func(
            *(_selected(q, own.indices), k, v, own.cu_seqlens, cu_seqlens, length, length),
            *(dropout, scaling, own.causal),
        )
        assert isinstance(rows, Tensor)
        if own.indices is None:
            return rows.unflatten(0, (batch, length)), None
        out = out + pad_input(rows, own.indices, batch, length)
    return out, None


def _selected(rows: Tensor, indices: Tensor | None) -> Tensor:
    return rows if indices is None else rows[indices]


# ---- registration -------------------------------------------------------------------------------


def _register() -> None:
    """Make the attention known to transformers; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _packing)


def _registered(attention: str) -> _AttentionBefore:
    _register()
    return _AttentionBefore(attention)


# Configs may name this attention already.  Where transformers comes later, or is just on its way
# in, `accelerate` or an accelerated model's pickle registers.
if hasattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface"):
    _register()


# ---- public -------------------------------------------------------------------------------------


def accelerate(model: nn.Module) -> Replaced:
    """Run a transformers BERT's attention and layer norms on these kernels, in place.

    All outputs stay what transformers gives (its "sdpa" attention), at padding as well, for every
    head.  Each BERT gets a config of its own, since others that share it, within ``model`` or
    outside, are left alone; one inside another, as in a model with a head, shares that one's.  What
    runs on these kernels already, such as a child that was accelerated before its parent, stays so.

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
    berts = _berts(model)
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
    before = _give_own_configs(model, attention.values())
    replaced: dict[int, _AttentionBefore] = {}
    for name, bert in attention.items():
        if bert.config._attn_implementation != IMPLEMENTATION:
            replaced[id(bert.config)] = _AttentionBefore(bert.config._attn_implementation)
            bert.set_attn_implementation(IMPLEMENTATION)
        if bert.config._attn_implementation != IMPLEMENTATION:
            for module, config in before:
                module.config = config
            raise ValueError(
                f"model: {name or type(bert).__name__} has an attention of its own code, which "
                "cannot be replaced"
            )
    for module, config in _configs(model):
        if id(config) in replaced:
            module._attention_before = replaced[id(config)]
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
    norms = [module for module in model.modules() if type(module) is _LayerNorm]
    holders = [(module, config) for module, config in _configs(model) if _is_accelerated(config)]
    if not norms and not holders:
        raise ValueError("model: not accelerated")
    for norm in norms:
        norm.__class__ = nn.LayerNorm  # type: ignore[assignment]
    # Models outside may share a config, so that theirs stays.  But where only layers are restored,
    # it is that of the model around them, which makes their masks.
    of_models = {id(bert.config) for bert in _berts(model).values()}
    plain: dict[int, Any] = {}
    for module, config in holders:
        key = id(config)
        if key not in plain:
            plain[key] = copy.deepcopy(config) if key in of_models else config
            # A model made from a config with this name replaced nothing.
            plain[key]._attn_implementation = str(getattr(module, "_attention_before", "sdpa"))
        module.config = plain[key]
        vars(module).pop("_attention_before", None)


def _berts(model: nn.Module) -> dict[str, Any]:
    """The models of the family in ``model``, those inside others behind them."""
    from transformers import PreTrainedModel

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type in FAMILY
    }


def _configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """The modules of ``model`` that have a config, and these."""
    pairs = ((module, vars(module).get("config")) for module in model.modules())
    return [(module, config) for module, config in pairs if config is not None]


def _is_accelerated(config: object) -> bool:
    return getattr(config, "_attn_implementation", None) == IMPLEMENTATION


def _give_own_configs(model: nn.Module, berts: Collection[Any]) -> list[tuple[Any, Any]]:
    """Give each of the models a copy of its config, and return the modules' configs before.

    A model inside another with the same config shares the copy.  So do modules of ``model`` around
    several such models, with the first.
    """
    before = _configs(model)
    copies: dict[int, Any] = {}
    of_models = {id(bert.config) for bert in berts}
    for bert in berts:
        shared = bert.config
        if id(shared) not in of_models:
            continue  # a copy already
        own = copy.deepcopy(shared)
        copies.setdefault(id(shared), own)
        for module, config in _configs(bert):
            if config is shared:
                module.config = own
    for module, config in before:
        if module.config is config:
            module.config = copies.get(id(config), config)
    return before
