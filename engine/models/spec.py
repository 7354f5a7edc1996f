"""Describe a model type: its classes, and its weights' names in the Hugging Face layout."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .config import EncoderConfig
from .encoder import Encoder


class Weight(NamedTuple):
    """One weight of an encoder.

    Attributes:
        name: in the encoder's state dict.
        parts: the names of the tensors that, one below the other, make it up.
        shape: of each of these.
    """

    name: str
    parts: Sequence[str]
    shape: tuple[int, ...]


class StoredWeights(NamedTuple):
    """The tensors of a model folder by the names that :class:`Weight` and heads know.

    Attributes:
        encoder: the encoder's.
        pretrained_head: of the decoder that masked LM was pretrained with, under BERT's names.
        others: that neither needs.
    """

    encoder: dict[str, Tensor]
    pretrained_head: dict[str, Tensor]
    others: dict[str, Tensor]


def _none(_config: Any) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """An encoder, its config, and its weights from and to Hugging Face.

    Attributes:
        model_types: of ``config.json``; the first is what folders are written with.
        name: what the model card of an export calls the model, such as BERT.
        config: the config's class.
        encoder: from a config to an encoder with random weights.
        weights: from a config to the name and shape of every weight.
        sort_weights: from a ``config.json`` and its tensors to the same tensors, sorted and named.
        untrained: from a config to what a folder holds besides the encoder's weights, since
            transformers' class of the model has it.
        untrained_note: what the model card says of that.
    """

    model_types: Sequence[str]
    name: str
    config: type[EncoderConfig]
    encoder: Callable[[Any], Encoder]
    weights: Callable[[Any], Iterable[Weight]]
    sort_weights: Callable[[Mapping[str, Any], Iterable[tuple[str, Tensor]]], StoredWeights]
    untrained: Callable[[Any], dict[str, Tensor]] = _none
    untrained_note: str = ""
