"""Describe a task's model as a class of transformers holds it: the encoder and one linear head.

Few of these classes put a plain linear layer on the encoder, so each model type has a file that
finds weights with which one of them computes it all the same (engine/models/bert_tasks.py,
engine/models/modernbert_tasks.py), or else a class of its own for the export to bring.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

SEQUENCES, TOKENS = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
"""The classes of transformers that load a task's model."""


class TaskModel(NamedTuple):
    """The files of a task's model but for the encoder's weights and the labels.

    Attributes:
        config: entries of ``config.json``, besides the encoder's or in their place.
        prefix: of the names of the encoder's weights.
        head: the other weights.
        code: Python files that ``config.json`` refers to, by name; none for a class that
            transformers has.
        note: a sentence for the model card about how the head is held; empty if it is as it was.
    """

    config: Mapping[str, Any]
    prefix: str
    head: Mapping[str, Tensor]
    code: Mapping[str, str] = MappingProxyType({})
    note: str = ""
