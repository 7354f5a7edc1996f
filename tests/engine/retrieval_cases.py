"""A small retrieval model and random texts with hard negatives."""

import numpy as np
import torch

from engine.data.split import TokenizedSplit
from engine.data.task_schema import TaskSchema
from engine.models.multitask import MultitaskModel

from .small_models import one_layer


def schema(task: str) -> TaskSchema:
    """A task with an anchor, a passage and a negative."""
    return TaskSchema(
        task=task, sentences=("q", "r", "n"), label="", kind="retrieval", high=1, labels="none"
    )


def split_of(examples: int, seed: int = 0, task: str = "replies") -> TokenizedSplit:
    """Anchors, passages and negatives of 3 to 8 tokens; all texts differ but some of the first."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(3, 9, examples * 3)
    ids = np.arange(examples * 3).reshape(examples, 3)
    texts = [draw.integers(1, 90, length) for length in lengths]
    for copy, of in ((4, 1), (6, 3), (11, 7)):  # a passage, an anchor, a negative
        texts[copy], ids.reshape(-1)[copy] = texts[of], ids.reshape(-1)[of]
    return TokenizedSplit(
        task=task,
        examples=examples,
        columns=3,
        tokens=np.concatenate(texts).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum([len(text) for text in texts]))),
        labels=np.ones(examples, dtype=np.float32),
        truncated=0,
        bad_rows={},
        blank=(),
        text_ids=ids,
    )


def model_of(
    loss: str = "default", dropout: float = 0.0, tasks: tuple[str, ...] = ("replies",)
) -> MultitaskModel:
    """One layer, a head for each task."""
    torch.manual_seed(0)
    config = one_layer(dropout=dropout)
    return MultitaskModel(
        config,
        [schema(task) for task in tasks],
        dict.fromkeys(tasks, "cosine"),
        pooling="mean",
        dropout_p=0.0,
        losses=dict.fromkeys(tasks, loss),
    )
