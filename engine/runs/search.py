"""Find the passages that answer anchors, by the head of a retrieval task."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.split import TokenizedSplit
from ..data.task_schema import TaskSchema
from ..models.multitask import MultitaskModel
from ..utils.errors import InputError
from .scoring import scores_of

_CHUNK = 1 << 22
"""Similarities in memory at a time."""


class Found(NamedTuple):
    """The k most similar of P passages to each of A anchors, the most similar first.

    Attributes:
        passages: int64 ``[A, k]``, their numbers.
        similarities: float32 ``[A, k]``.
        truncated: how many texts were cut to the limit on the length.
    """

    passages: npt.NDArray[np.int64]
    similarities: npt.NDArray[np.float32]
    truncated: int


def anchors_of(form: TaskSchema) -> TaskSchema:
    """Return the schema of anchors alone.

    Raises:
        InputError: it is of no retrieval task.
    """
    return _with_column(form, 0)


def passages_of(form: TaskSchema) -> TaskSchema:
    """Return the schema of passages alone.

    Raises:
        InputError: it is of no retrieval task.
    """
    return _with_column(form, 1)


def _with_column(form: TaskSchema, number: int) -> TaskSchema:
    if form.labels != "none":
        raise InputError(f"task {form.task!r}: finds no passages (its kind is {form.kind})")
    return replace(form, sentences=(form.sentences[number],))


def search(
    model: MultitaskModel, anchors: TokenizedSplit, passages: TokenizedSplit, k: int
) -> Found:
    """Find the passages that are most similar to anchors.

    Args:
        model: trained.
        anchors: of one column, with text ids.
        passages: the same.
        k: how many for each anchor, at most all.

    Raises:
        InputError: what the model computes is not finite.
    """
    found = _vectors(model, passages)
    asked, k = _vectors(model, anchors), min(k, len(found))
    best = [
        (chunk @ found.t()).topk(k, dim=1) for chunk in asked.split(max(1, _CHUNK // len(found)))
    ]
    return Found(
        np.concatenate([each.indices.numpy() for each in best]),
        np.concatenate([each.values.numpy() for each in best]),
        anchors.truncated + passages.truncated,
    )


def _vectors(model: MultitaskModel, split: TokenizedSplit) -> Tensor:
    vectors = scores_of(model, split)[:, 0]
    if not bool(torch.isfinite(vectors).all()):
        raise InputError(
            f"{split.task}: vectors are not finite; train it again with a lower lr, or with a "
            "precision of wider range (bf16, fp32)"
        )
    return vectors
