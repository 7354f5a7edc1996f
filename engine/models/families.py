"""Convert encoders that compute what a BERT computes, but are stored in other layouts.

Each is converted to the BERT that it is equal to (engine/models/bert.py), so that no other module
depends on the layout:

bert                              as it is
electra                           another prefix; embeddings as wide as the layers
camembert, roberta, xlm-roberta   positions count from ``pad_token_id + 1``: the rows before go
distilbert                        other names; without token types, for which zeros are added

An encoder with one token type gets a second that is the same, since pairs of segments have two.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.errors import InputError

_POSITIONS, _TYPES = (
    f"embeddings.{table}_embeddings.weight" for table in ("position", "token_type")
)
_MOST_POSITIONS = 512
"""Rows of the position table where ``config.json`` does not say."""
# What models leave beside the encoder, or in it without weights of their own.
_NOT_ENCODER = ("pooler.", "cls.", "classifier.", "dropout.", "embeddings.position_ids")
# Names of the norm's weights in checkpoints converted from TensorFlow.
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


class Family(NamedTuple):
    """Differences of one model type's folders from a BERT's.

    Attributes:
        prefix: of the encoder's weights in models that have heads.
        fields: names of config.json's fields, from theirs to BERT's.
        weights: parts of the weights' names, from theirs to BERT's.
        counts_from_padding: positions count from ``pad_token_id + 1``, not from 0.
        has_token_types: there is a table of them.
    """

    prefix: str
    fields: Mapping[str, str] = MappingProxyType({})
    weights: Mapping[str, str] = MappingProxyType({})
    counts_from_padding: bool = False
    has_token_types: bool = True


_ROBERTA = Family(
    prefix="roberta.",
    weights={
        "lm_head.dense.": "cls.predictions.transform.dense.",
        "lm_head.layer_norm.": "cls.predictions.transform.LayerNorm.",
        "lm_head.bias": "cls.predictions.bias",
    },
    counts_from_padding=True,
)
_DISTILBERT = Family(
    prefix="distilbert.",
    fields={
        "activation": "hidden_act",
        "attention_dropout": "attention_probs_dropout_prob",
        "dim": "hidden_size",
        "dropout": "hidden_dropout_prob",
        "hidden_dim": "intermediate_size",
        "n_heads": "num_attention_heads",
        "n_layers": "num_hidden_layers",
    },
    weights={
        "transformer.layer.": "encoder.layer.",
        ".attention.q_lin.": ".attention.self.query.",
        ".attention.k_lin.": ".attention.self.key.",
        ".attention.v_lin.": ".attention.self.value.",
        ".attention.out_lin.": ".attention.output.dense.",
        ".sa_layer_norm.": ".attention.output.LayerNorm.",
        ".ffn.lin1.": ".intermediate.dense.",
        ".ffn.lin2.": ".output.dense.",
        ".output_layer_norm.": ".output.LayerNorm.",
        "vocab_transform.": "cls.predictions.transform.dense.",
        "vocab_layer_norm.": "cls.predictions.transform.LayerNorm.",
        "vocab_projector.bias": "cls.predictions.bias",
    },
    has_token_types=False,
)
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(prefix="bert."),
        "camembert": _ROBERTA,
        "distilbert": _DISTILBERT,
        "electra": Family(prefix="electra."),
        "roberta": _ROBERTA,
        "xlm-roberta": _ROBERTA,
    }
)
"""By the ``model_type`` of config.json."""


def _family_of(config: Mapping[str, Any]) -> Family:
    return FAMILIES[config.get("model_type", "bert")]


def bert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of the BERT that a model is equal to.

    Args:
        config: that of the model, of a type in :data:`FAMILIES` or of none, for a BERT.

    Raises:
        InputError: where positions begin cannot be told.
    """
    names = _family_of(config).fields
    fields = {names.get(name, name): value for name, value in config.items()}
    positions = fields.setdefault("max_position_embeddings", _MOST_POSITIONS)
    types = fields.get("type_vocab_size")
    # What is no size stays as it is, to be refused as such.
    if type(positions) is int and positions > 0:
        fields["max_position_embeddings"] = positions - _first_position(config)
    if type(types) is int and types > 0:
        fields["type_vocab_size"] = max(2, types)
    return fields


def bert_tensors(
    config: Mapping[str, Any], tensors: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a model's weights as those of the BERT that it is equal to.

    Args:
        config: its ``config.json``, as for :func:`bert_fields`.
        tensors: its weights by name.

    Returns:
        The weights of the encoder, without prefix, and the others (the pooler, heads).
    """
    family, found = _family_of(config), dict(tensors)
    prefixed = any(name.startswith(family.prefix) for name in found)
    encoder: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in found.items():
        short = _berts(name.removeprefix(family.prefix), family)
        is_head = prefixed and not name.startswith(family.prefix)
        (others if is_head or short.startswith(_NOT_ENCODER) else encoder)[short] = tensor
    positions = encoder.get(_POSITIONS)
    if positions is not None and positions.dim() == 2:  # else its shape is refused
        encoder[_POSITIONS] = positions[_first_position(config) :]
        if not family.has_token_types:
            encoder[_TYPES] = torch.zeros(2, positions.shape[1])
    if family.has_token_types and config.get("type_vocab_size") == 1 and _TYPES in encoder:
        encoder[_TYPES] = encoder[_TYPES].repeat(2, 1)
    return encoder, others


def _berts(name: str, family: Family) -> str:
    """Return what BERT calls a weight."""
    for theirs, ours in (_OLD_NAMES | dict(family.weights)).items():
        name = name.replace(theirs, ours)
    return name


def name_in_family(model_type: str, name: str) -> str:
    """Return what a model type of :data:`FAMILIES` calls a module or weight that BERT calls so."""
    for theirs, ours in FAMILIES[model_type].weights.items():
        name = f"{name}.".replace(ours, theirs).removesuffix(".")
    return name


def _first_position(config: Mapping[str, Any]) -> int:
    """Return the row of the position table that belongs to the first token."""
    if not _family_of(config).counts_from_padding:
        return 0
    padding = config.get("pad_token_id", 1)
    if not isinstance(padding, int) or padding < 0:
        raise InputError(f"pad_token_id = {padding!r}: expected a whole number")
    return padding + 1
