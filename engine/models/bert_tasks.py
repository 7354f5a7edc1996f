"""Hold a BERT's task in a class of transformers.

``BertForTokenClassification`` is a linear layer on each token, as our head of tags is.
``BertForSequenceClassification`` has a layer with tanh below its linear one, which ours has not.
Its sister of ELECTRA, whose encoder is a BERT's, has a layer with gelu there, and

    gelu(x) - gelu(-x) = x Phi(x) + x Phi(-x) = x

so that the pair of layers ``[W; -W]`` and ``[I, -I]`` is the linear layer W, on the first token's
state.  No class of transformers takes the mean of a BERT's tokens: for that
engine/models/modeling_pooled_bert.py goes into the export.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import EncoderConfig
from .heads import LinearHead
from .task_model import SEQUENCES, TaskModel

_CODE = Path(__file__).with_name("modeling_pooled_bert.py")
"""Not imported: it needs transformers, which the engine does without."""
_CONFIG, _MODEL = "PooledBertConfig", "PooledBertForSequenceClassification"
_MODEL_TYPE = "pooled_bert"


def bert_task(config: EncoderConfig, head: LinearHead, pooling: str, dropout_p: float) -> TaskModel:
    """Return a task's model in the class of transformers that computes it.

    Args:
        config: of the encoder.
        head: ``[L, H]``.
        pooling: the input of a head that reads no tokens.
        dropout_p: of the dropout before the head, for those who train on.
    """
    width, common = config.hidden_size, {"classifier_dropout": dropout_p}
    if head.reads_tokens:
        return TaskModel(
            config=common | {"architectures": ["BertForTokenClassification"]},
            prefix="bert.",
            head={"classifier.weight": head.weight, "classifier.bias": head.bias},
        )
    if pooling == "cls" and head.share_of is None and 2 * len(head.bias) <= width:
        return _electra(width, head, common)
    own: dict[str, Any] = {
        "architectures": [_MODEL],
        "model_type": _MODEL_TYPE,  # without the code transformers takes no BERT's class for it
        "auto_map": {"AutoConfig": f"{_CODE.stem}.{_CONFIG}", SEQUENCES: f"{_CODE.stem}.{_MODEL}"},
        "classifier_pooling": pooling,
        "share_of": None if head.share_of is None else list(head.share_of),
    }
    return TaskModel(
        config=common | own,
        prefix="bert.",
        head={"classifier.weight": head.weight, "classifier.bias": head.bias},
        code={_CODE.name: _CODE.read_text(encoding="utf-8")},
    )


def _electra(width: int, head: LinearHead, common: dict[str, Any]) -> TaskModel:
    """Return the model in ELECTRA's class, with the identity that the module's docstring gives."""
    outputs = len(head.bias)
    dense, bias = torch.zeros(width, width), torch.zeros(width)
    projection = torch.zeros(outputs, width)
    for sign, first in ((1.0, 0), (-1.0, outputs)):
        rows = slice(first, first + outputs)
        dense[rows], bias[rows] = sign * head.weight, sign * head.bias
        projection[:, rows] = sign * torch.eye(outputs)
    weights: dict[str, Tensor] = {
        "classifier.dense.weight": dense,
        "classifier.dense.bias": bias,
        "classifier.out_proj.weight": projection,
        "classifier.out_proj.bias": torch.zeros(outputs),
    }
    return TaskModel(
        config=common
        | {
            "architectures": ["ElectraForSequenceClassification"],
            "model_type": "electra",
            "embedding_size": width,
        },
        prefix="electra.",
        head=weights,
        note="It is stored as an ELECTRA, whose encoder is a BERT's, because ELECTRA's class can "
        "hold a head that is linear in the first token's state: gelu(x) - gelu(-x) is x.",
    )
