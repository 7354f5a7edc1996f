"""Make a BERT of transformers run packed on these kernels, in place, and undo that.

Modules stay the same and get other classes (class_exchange.py): the encoder packs its inputs and
pads its outputs (transformers_models.py), layers compute on the packed stream
(transformers_layers.py).  Where a layer keeps its own code, attention goes through transformers'
registry, to which these kernels are known as ``superbert``.
"""

import copy
import sys
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from . import transformers_families  # noqa: F401  (fills FAMILIES)
from .class_exchange import (
    exchange_class,
    is_called_by_class,
    is_exchanged,
    is_wrapped,
    restore_class,
)
from .sentence_transformers_inputs import (
    PackedInputs,
    SentenceTransformer,
    encoding_models,
    give_packed,
    give_padded,
    padded_transformers,
)
from .transformers_embeddings import Embeddings
from .transformers_layers import (
    Dropout,
    LayerNorm,
    Mask,
    SpanLogits,
    SpanStates,
    attention,
)
from .transformers_models import (
    FAMILIES,
    IMPLEMENTATION,
    BoundaryHead,
    CausalHead,
    PackedOutput,
    PaddedHead,
)
from .transformers_packing import Packing

FAMILY = frozenset(FAMILIES)
"""``model_type`` of the encoders that can be accelerated."""
# Heads that read each token's hidden state, and what is pooled; others look at places of a batch.
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "GenerationDecoder")
_TOKEN_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForPreTraining", *_CAUSAL_HEADS)


class Replaced(NamedTuple):
    """Modules that :func:`accelerate` replaced.

    Attributes:
        attention: names of the models that run packed, with attention on these kernels.
        layer_norms: names of the layer norms.
    """

    attention: tuple[str, ...]
    layer_norms: tuple[str, ...]


# ---- registration -------------------------------------------------------------------------------


def _mask(mask_function: Callable[..., Any], **_: object) -> Mask:
    """Make the attention mask of a packed model's layers."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (bidirectional_mask_function, causal_mask_function):
        raise ValueError("attention: masks other than padding and causality are not supported")
    return Mask(mask_function is causal_mask_function)


def _attend(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention on ``[1, heads, T, width]``; returns ``[1, T, heads, width]``."""
    # Not by an index, whose backward pass fills zeros for each of them.
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attention(q, k, v, attention_mask, packing, dropout, scaling)[None], None


def _register() -> None:
    """Make the attention known to transformers; again does no harm."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


# Configs may name this attention already.  Where transformers comes later, or is just on its way
# in, `accelerate` or an accelerated model's pickle registers.
if hasattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface"):
    _register()


# ---- public -------------------------------------------------------------------------------------


def accelerate(model: nn.Module, *, packed: bool = False) -> Replaced:
    """Run a transformers BERT on packed tokens and on these kernels, in place.

    A padded batch is packed once, before the embeddings, and its hidden states are padded once,
    behind the last layer.  Outputs are what transformers gives for every token and for the first
    place of every row, for every head; hidden states at other padding are zeros, and logits there
    what a head makes of zeros.  A question answering head gives padding, first places too, the
    lowest logit, so that no answer lies there.

    Packed inputs, as transformers' flash attention takes them (``input_ids [1, T]`` with
    ``position_ids`` and ``cu_seq_lens_q``), give packed hidden states ``[1, T, H]``, and pooled
    outputs ``[S, H]``, a row for each sequence.  Under heads that look at places of a batch they
    are padded.  `PackingCollator` makes them.  A sentence-transformers model is made to give its
    BERT packed inputs by itself, where all of its modules take them.

    Each BERT gets a config of its own, since others that share it, within ``model`` or outside, are
    left alone; one inside another, as in a model with a head, shares that one's.  What was
    accelerated already, such as a child before its parent, stays so.  Parameters, their names and
    hooks stay; hooks inside the encoder get ``[1, T, H]``.  A copy, a pickle and what `torch.save`
    makes of the model stay accelerated, in other processes too.  ``save_pretrained`` writes a plain
    model.

    Args:
        model: a BERT of transformers (see ``FAMILY``), or a module that holds one, such as a
            sentence-transformers model.
        packed: leave hidden states packed, ``[1, T, H]``, for padded inputs too; the output's
            last field ``cu_seqlens`` and attribute ``max_seqlen`` say where sequences begin.

    Returns:
        The names of what was replaced, within ``model``.

    Raises:
        ValueError: no such BERT inside, one with cross attention or with an attention of its own
            code, all is accelerated already, ``packed`` with a head that looks at places of a
            padded batch, or a sentence-transformers model that scores places of padding.
    """
    berts = _berts(model)
    if not berts:
        raise ValueError(
            f"model: nothing to accelerate in a {type(model).__name__}; it holds no transformers "
            f"model of type {', '.join(sorted(FAMILY))}"
        )
    for name, bert in berts.items():
        _check(bert, name or type(bert).__name__)
    forms = _output_forms(berts, packed)
    padded = padded_transformers(model)
    if packed and padded:
        raise ValueError(
            "packed: a sentence-transformers model packs its texts itself; accelerate it without"
        )
    _register()
    fresh = {name: bert for name, bert in berts.items() if not _is_accelerated(bert)}
    norms = [name for name, module in model.named_modules() if _is_norm(module)]
    if not fresh and not norms and not padded:
        raise ValueError("model: accelerated already; `restore` it first")
    _name_attention(model, {k: v for k, v in fresh.items() if not _has_own_attention(v)})
    for encoder in (bert for bert in berts.values() if _is_encoder(bert)):
        is_fresh, form = not is_exchanged(encoder), forms[id(encoder)]
        if is_fresh:
            _exchange_layers(encoder)
        if is_fresh or form[0] is not PackedOutput.AS_GIVEN:  # which asks for nothing
            encoder.packed_output, encoder.with_first_places = form
    for module in model.modules():
        if _is_norm(module):
            module.__class__ = LayerNorm
        elif type(module) is nn.Dropout:
            module.__class__ = Dropout
    for bert in berts.values():
        if not _is_encoder(bert) and not is_exchanged(bert):
            _exchange_head(bert)
    for outer in encoding_models(model) if padded else ():
        exchange_class(outer, SentenceTransformer)
    for transformer in padded:
        give_packed(transformer)
    return Replaced(tuple(fresh), tuple(norms))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate` in a model and all that it holds.

    Args:
        model: the module that was given to it, a copy, a parent, or an encoder inside.

    Raises:
        ValueError: nothing in it is accelerated, or it is a part of an encoder.
    """
    within = {id(part) for bert in _berts(model).values() for part in bert.modules()}
    transformers = [module for module in model.modules() if isinstance(module, PackedInputs)]
    outer = [module for module in model.modules() if isinstance(module, SentenceTransformer)]
    within |= set(map(id, [*transformers, *outer]))
    ours = [module for module in model.modules() if type(module) in _PLAIN or is_exchanged(module)]
    holders = [(module, config) for module, config in _configs(model) if _names_ours(config)]
    if not ours and not holders:
        raise ValueError("model: not accelerated")
    if any(map(is_wrapped, ours)):
        raise ValueError(
            "model: a module of it has got another class since it was accelerated, as fully_shard "
            "gives; restore it before that"
        )
    if any(id(module) not in within for module in ours if is_exchanged(module)):
        raise ValueError(
            f"model: a {type(model).__name__} is a part of an accelerated encoder, which cannot be "
            "restored alone; give the encoder, or what holds it"
        )
    for module in ours:
        if is_exchanged(module):
            restore_class(module)
            for name in ("packed_output", "with_first_places"):
                vars(module).pop(name, None)
        else:
            module.__class__ = _PLAIN[type(module)]
    plain: dict[int, Any] = {}  # others may share a config, so that theirs stays
    for module, config in holders:
        if id(config) not in plain:
            plain[id(config)] = copy.deepcopy(config)
            # A model made from a config with this name replaced nothing.
            before = getattr(module, "_attention_before", "sdpa")
            plain[id(config)]._attn_implementation = str(before)
        module.config = plain[id(config)]
        vars(module).pop("_attention_before", None)
    for transformer in transformers:
        give_padded(transformer)


# ---- modules ------------------------------------------------------------------------------------

_PLAIN: dict[type, type] = {LayerNorm: nn.LayerNorm, Dropout: nn.Dropout}


def _berts(model: nn.Module) -> dict[str, Any]:
    """The models of the family in ``model``, those inside others behind them."""
    from transformers import PreTrainedModel

    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PreTrainedModel) and module.config.model_type in FAMILY
    }


def _is_encoder(bert: nn.Module) -> bool:
    """Whether a model is an encoder itself, and not an encoder with a head."""
    return isinstance(getattr(bert, "embeddings", None), nn.Module)


def _is_accelerated(bert: Any) -> bool:
    encoders = [part for part in _berts(bert).values() if _is_encoder(part)]
    names_ours = _has_own_attention(bert) or _names_ours(bert.config)
    return names_ours and all(map(is_exchanged, encoders))


def _has_own_attention(bert: Any) -> bool:
    return FAMILIES[bert.config.model_type].own_attention


def _is_norm(module: nn.Module) -> bool:
    return type(module) is nn.LayerNorm and len(module.normalized_shape) == 1


def _is_transformers(kind: type) -> bool:
    return kind.__module__.startswith("transformers.")


def _check(bert: Any, name: str) -> None:
    """Check that a model is one that can run packed.

    Raises:
        ValueError: it is not; nothing was changed.
    """
    if getattr(bert.config, "add_cross_attention", False):  # which not every config has
        raise ValueError(f"model: {name} has cross attention, which is not supported")
    if not _is_encoder(bert) or is_exchanged(bert):
        return
    family = FAMILIES[bert.config.model_type]
    if not type(bert).forward.__module__.startswith("transformers."):
        raise ValueError(
            f"model: {name} has a forward pass of its own code, which is not supported"
        )
    if not is_called_by_class(bert):
        raise ValueError(
            f"model: {name} has a forward pass that was set on it, as accelerate's `prepare` does; "
            "accelerate it before, or unwrap it"
        )
    if getattr(bert.config, "chunk_size_feed_forward", 0) > 1:
        raise ValueError(
            f"model: {name} has chunk_size_feed_forward = {bert.config.chunk_size_feed_forward}, "
            "of which a packed batch is no multiple; set it to 0 when you load the model"
        )
    if not family.own_attention:
        return
    # Embeddings of their own code stay as they are.
    needed = {name for name, kind in family.layers.items() if not issubclass(kind, Embeddings)}
    for module in bert.modules():
        kinds = {base.__name__ for base in type(module).__mro__ if _is_transformers(base)}
        if kinds & needed and not _is_transformers(type(module)):
            raise ValueError(
                f"model: {name} has a {type(module).__name__} of its own code, which cannot be "
                "replaced"
            )


def _output_forms(berts: dict[str, Any], packed: bool) -> dict[int, tuple[PackedOutput, bool]]:
    """Return the form of the hidden states that each encoder, by its id, gives its head.

    Returns:
        When they stay packed, and whether first places are computed where they are padding.
    """
    forms: dict[int, tuple[PackedOutput, bool]] = {}
    heads: dict[int, Any] = {}  # around each encoder, the innermost so far
    for bert in berts.values():  # those inside others come last
        form = PackedOutput.ALWAYS if packed else PackedOutput.AS_GIVEN
        if _is_encoder(bert):
            forms.setdefault(id(bert), (form, True))
            continue
        head = type(bert).__name__
        # Splinter's select the tokens of questions, RoCBert's calls its encoder for other inputs.
        is_refused = head.startswith("Splinter") or head == "RoCBertForPreTraining"
        if is_refused or not head.endswith(_TOKEN_HEADS):
            if packed:
                raise ValueError(
                    f"packed: a {head} looks at places of a padded batch; accelerate its encoder "
                    "with packed=True, or the whole without"
                )
            takes_mean = getattr(bert.config, "classifier_pooling", None) == "mean"
            needs_mask = head.endswith("SequenceClassification") and takes_mean
            is_refused |= needs_mask or head.endswith("MultipleChoice")
            form = PackedOutput.REFUSED if is_refused else PackedOutput.NEVER
        own = form, _span_logits(bert) is None
        for part in filter(_is_encoder, bert.modules()):
            outer = heads.setdefault(id(part), bert)
            is_inside = any(inner is bert for inner in outer.modules())
            if not is_inside and forms[id(part)] != own:
                raise ValueError(
                    f"model: a {head} and a {type(outer).__name__} share an encoder, but need "
                    "different forms of its output; give each its own, or accelerate the encoder"
                )
            heads[id(part)], forms[id(part)] = bert, own
            was_packed = getattr(part, "packed_output", None) is PackedOutput.ALWAYS
            if was_packed and form in (PackedOutput.NEVER, PackedOutput.REFUSED):
                raise ValueError(
                    f"model: the encoder of a {head}, which looks at places of a padded batch, was "
                    "accelerated with packed=True; restore it first"
                )
    return forms


def _exchange_layers(encoder: Any) -> None:
    """Give an encoder and its layers the classes of packed ones."""
    family = FAMILIES[encoder.config.model_type]
    if family.encoder is not None:
        exchange_class(family.encoder(encoder), family.padded)
    for module in list(encoder.modules()):
        instead = family.layers.get(type(module).__name__)
        is_theirs = _is_transformers(type(module)) and is_called_by_class(module)
        if instead is not None and is_theirs and not is_exchanged(module):
            exchange_class(module, instead)
    exchange_class(encoder, family.model)


def _span_logits(bert: Any) -> nn.Module | None:
    """Return the layer that gives a question answering head's logits; None in other models."""
    if not type(bert).__name__.endswith("QuestionAnswering"):
        return None
    found = getattr(bert, FAMILIES[bert.config.model_type].span_logits, None)
    return found if isinstance(found, nn.Module) else None


def _exchange_head(bert: Any) -> None:
    """Give a model with a head, or a layer of its head, the class that packed tokens ask for."""
    family, logits = FAMILIES[bert.config.model_type], _span_logits(bert)
    if logits is not None and not is_exchanged(logits):
        exchange_class(logits, SpanLogits)
        if family.span_states is not None:
            exchange_class(getattr(bert, family.span_states), SpanStates)
    if family.drops_boundaries:
        is_choice = type(bert).__name__.endswith("MultipleChoice")
        exchange_class(bert, PaddedHead if is_choice else BoundaryHead)
    elif type(bert).__name__.endswith(_CAUSAL_HEADS):
        exchange_class(bert, CausalHead)


# ---- configs ------------------------------------------------------------------------------------


class _AttentionBefore(str):
    """The name of a module's attention before :func:`accelerate`; unpickling it registers ours."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _registered, (str(self),)


def _registered(attention: str) -> _AttentionBefore:
    _register()
    return _AttentionBefore(attention)


def _configs(model: nn.Module) -> list[tuple[Any, Any]]:
    """The modules of ``model`` that have a config, and these."""
    pairs = ((module, vars(module).get("config")) for module in model.modules())
    return [(module, config) for module, config in pairs if config is not None]


def _names_ours(config: object) -> bool:
    return getattr(config, "_attn_implementation", None) == IMPLEMENTATION


def _name_attention(model: nn.Module, berts: dict[str, Any]) -> None:
    """Give each of the models a config of its own that names our attention.

    Raises:
        ValueError: a model's attention is code of its own; nothing is changed then.
    """
    before = _give_own_configs(model, [b for b in berts.values() if not _names_ours(b.config)])
    replaced: dict[int, _AttentionBefore] = {}
    for name, bert in berts.items():
        if not _names_ours(bert.config):
            replaced[id(bert.config)] = _AttentionBefore(bert.config._attn_implementation)
            bert.set_attn_implementation(IMPLEMENTATION)
        if not _names_ours(bert.config):
            for module, config in before:
                module.config = config
            raise ValueError(
                f"model: {name or type(bert).__name__} has an attention of its own code, which "
                "cannot be replaced"
            )
    for module, config in _configs(model):
        if id(config) in replaced:
            module._attention_before = replaced[id(config)]


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
