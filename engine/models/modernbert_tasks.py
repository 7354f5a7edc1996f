"""Hold a ModernBERT's task in transformers' classes for sequences and tokens.

Both put a layer ``norm(act(dense(h)))`` before the linear one.  With ``act`` the identity and
``dense`` as

    z = [W h + b; -(W h + b); K; ...; K; -K; ...; -K]

the mean of z is 0 and its variance ``(n K² + 2 |W h + b|²) / H``, with n entries of ±K.  Up to a
relative ``|W h + b|² / (n K²)`` it is the constant ``n K² / H``, whose root is the norm's weight.
So the norm leaves ``W h + b``, which ``[I, -I] / 2`` reads; what rounding leaves of the mean
cancels.  K is 2^15, the largest power of two that fp16 has: of three logits of size 100, at a width
of 768, less than 1e-7 is lost.
"""

import math
from typing import Any

import torch

from ..utils.errors import InputError
from .config import EncoderConfig
from .heads import LinearHead
from .task_model import TaskModel

_K = 2.0**15


def modernbert_task(
    config: EncoderConfig, head: LinearHead, pooling: str, dropout_p: float
) -> TaskModel:
    """Return a task's model in the class of transformers that computes it.

    Args:
        config: of the encoder.
        head: ``[L, H]``.
        pooling: the input of a head that reads no tokens.
        dropout_p: of the dropout before the head, for those who train on.

    Raises:
        InputError: the class cannot hold the head.
    """
    if head.share_of is not None:
        raise InputError(
            "its values are a sigmoid's (loss = 'cross_entropy'), which transformers' class of "
            "ModernBERT does not compute; train it with loss = 'mse'"
        )
    width, outputs = config.hidden_size, len(head.bias)
    constants = width - 2 * outputs
    if constants < 2:
        raise InputError(
            f"its {outputs} outputs are more than {(width - 2) // 2}, which transformers' class of "
            f"a ModernBERT of hidden_size = {width} can hold"
        )
    half = constants // 2
    dense, bias = torch.zeros(width, width), torch.zeros(width)
    dense[:outputs], dense[outputs : 2 * outputs] = head.weight, -head.weight
    bias[:outputs], bias[outputs : 2 * outputs] = head.bias, -head.bias
    bias[2 * outputs : 2 * outputs + half] = _K
    bias[2 * outputs + half : 2 * outputs + 2 * half] = -_K
    identity = torch.eye(outputs) / 2
    rest = torch.zeros(outputs, constants)
    weights = {
        "head.dense.weight": dense,
        "head.dense.bias": bias,
        "head.norm.weight": torch.full((width,), _K * math.sqrt(2 * half / width)),
        "classifier.weight": torch.cat([identity, -identity, rest], dim=1),
        "classifier.bias": torch.zeros(outputs),
    }
    if config.head_biases.norm:
        weights["head.norm.bias"] = torch.zeros(width)
    name = "Token" if head.reads_tokens else "Sequence"
    entries: dict[str, Any] = {
        "architectures": [f"ModernBertFor{name}Classification"],
        "classifier_activation": "linear",
        "classifier_bias": True,
        "classifier_dropout": dropout_p,
        "classifier_pooling": pooling,
    }
    return TaskModel(
        config=entries,
        prefix="model.",
        head=weights,
        note="Large constants in the head's first layer keep its norm from changing the logits.",
    )
