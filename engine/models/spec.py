"""Describe a model type: its classes, and its weights' names in the Hugging Face layout."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .config import EncoderConfig
from .encoder import Encoder
from .heads import LinearHead
from .task_model import TaskModel


class Weight(NamedTuple):
    """One weight of an encoder.

    Attributes:
        name: in the encoder's state dict.
        stored_names: the names of the stored tensors that it is the concatenation of, along the
            first dimension.
        shape: of each stored tensor.
    """

    name: str
    stored_names: Sequence[str]
    shape: tuple[int, ...]


class StoredWeights(NamedTuple):
    """The tensors of a model folder, by their names in :class:`Weight` and in heads.

    Attributes:
        encoder: those of the encoder.
        pretrained_head: those of the head that masked LM was pretrained with, under BERT's names.
        others: those that neither needs.
    """

    encoder: dict[str, Tensor]
    pretrained_head: dict[str, Tensor]
    others: dict[str, Tensor]


def _none(_config: Any) -> dict[str, Tensor]:
    return {}


def _same_name(_model_type: str, name: str) -> str:
    return name


def _as_they_are(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """An encoder, its config, and its weights from and to Hugging Face.

    Attributes:
        model_types: of ``config.json``; written folders have the first.
        name: of the model, in the model card of an export, such as BERT.
        config: the config's class.
        encoder: builds an encoder with random weights from a config.
        weights: returns the names and shape of every weight, for a config.
        sort_weights: sorts and names the tensors of a folder, given its ``config.json``.
        name_in: returns what transformers' model of a ``model_type`` calls a module, given its name
            in :class:`Weight`; it is the same by default.
        store_head: renames the weights of masked LM's head, from BERT's names to a folder's.
        untrained: returns the tensors that a written folder has besides the encoder's weights,
            because transformers' class of the model has them.
        untrained_note: describes these tensors in the model card.
        task_model: holds a head in a class of transformers, given the config, the head, the pooling
            and the rate of the dropout before it; raises InputError where none can.  None where
            tasks are not exported by themselves.
        has_token_types: whether the encoder tells the two sentences of a pair apart by a number for
            each token.
    """

    model_types: Sequence[str]
    name: str
    config: type[EncoderConfig]
    encoder: Callable[[Any], Encoder]
    weights: Callable[[Any], Iterable[Weight]]
    sort_weights: Callable[[Mapping[str, Any], Iterable[tuple[str, Tensor]]], StoredWeights]
    name_in: Callable[[str, str], str] = _same_name
    store_head: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are
    untrained: Callable[[Any], dict[str, Tensor]] = _none
    untrained_note: str = ""
    task_model: Callable[[Any, LinearHead, str, float], TaskModel] | None = None
    has_token_types: bool = True
