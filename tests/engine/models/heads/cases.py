"""Heads and the states that they read, without an encoder."""

import numpy as np
import torch
from torch import Tensor

from engine.config.objective import ObjectiveRecipe
from engine.data.batch_shapes import ShapePlan
from engine.data.collate import PackedBatch, pack
from engine.data.task_schema import FORMATS, TaskSchema
from engine.data.tokenizer import Tokenizer
from engine.models.bert import BertConfig
from engine.models.heads import (
    IN_BATCH,
    PLAIN,
    ClassLossSettings,
    Head,
    HeadSettings,
    Results,
    SimilaritySettings,
    build_head,
)
from engine.models.layers import Embedding, Linear
from engine.models.multitask import MultitaskModel
from engine.models.pooling import SharedLayers, TaskStates
from engine.runs.objectives import build_examples, head_settings

from ...small_models import random_split

WIDTH, EXAMPLES = 12, 5

TEXTS = [f"the film {n} was fine. i saw it {n} times. it is {n * n}!" for n in range(12)]
OBJECTIVES = ("masked_lm", "masked_lm_next", "simcse")
SEED = torch.tensor(5)

CONFIG = BertConfig(
    vocab_size=16,
    hidden_size=WIDTH,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
)

CLASSES_OF_PAIRS = TaskSchema(
    task="nli", sentences=("a", "b"), label="label", kind="classes", high=2
)


def states_of(pooled: Tensor, pair: Linear | None = None) -> TaskStates:
    """The states of sequences of one token each, outside training."""
    return TaskStates(
        tokens=pooled,
        pooled=pooled,
        cu_seqlens=torch.arange(len(pooled) + 1, dtype=torch.int32),
        max_seqlen=1,
        labels=None,
        seed=None,
        shared=SharedLayers(Embedding(4, WIDTH), pair),
        row=None,
        num_rows=1,
    )


def results(
    predictions, labels, probabilities=None, offsets=None, classes=(), ranking=None
) -> Results:
    """Answers of one example each, unless there are ``offsets``."""
    return Results(
        predictions=np.asarray(predictions, np.float64),
        labels=np.asarray(labels, np.float64),
        probabilities=None if probabilities is None else np.asarray(probabilities, np.float64),
        offsets=np.arange(len(labels) + 1) if offsets is None else np.asarray(offsets),
        classes=tuple(classes),
        ranking=ranking,
    )


def head_of(
    task: str | TaskSchema,
    features: str,
    loss: str = "default",
    class_loss: ClassLossSettings = PLAIN,
    similarity: SimilaritySettings = IN_BATCH,
) -> Head:
    form = FORMATS[task] if isinstance(task, str) else task
    settings = HeadSettings(
        kind=form.kind,
        name=form.task,
        config=CONFIG,
        task=form,
        features=features,
        loss=loss,
        class_loss=class_loss,
        similarity=similarity,
        dropout_p=0.5,
    )
    return build_head(settings).eval()


def of_output(head: Head, vector: np.ndarray) -> np.ndarray:
    """The output layer on a vector, in float64."""
    weight, bias = (p.detach().double().numpy() for p in (head.output.weight, head.output.bias))
    return weight @ np.atleast_1d(vector) + bias


def within_twice(found: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Whether ``found`` errs at most twice as much as torch does in the same dtype.

    A rounding of the result itself is allowed beside it.
    """
    rounding = torch.finfo(found.dtype).eps * exact.abs().max()
    error, allowed = ((x.double() - exact).abs().max() for x in (found, plain))
    return bool(error <= 2 * allowed + rounding)


def batch_of(
    tokenizer: Tokenizer, names: tuple[str, ...], step: int = 0, plan: ShapePlan | None = None
) -> PackedBatch:
    """Five examples of ``sst`` and of objectives, each named as its kind."""
    sources = [
        random_split("sst", 5, vocab=97, seed=1)
        if name == "sst"
        else build_examples(name, ObjectiveRecipe(kind=name), TEXTS, tokenizer, 64, 0)
        for name in names
    ]
    return pack(sources, [np.arange(5)] * len(names), step, plan)


def model_of_objectives() -> MultitaskModel:
    """A small model of ``sst`` and all objectives, with dropout and an adapter."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=97,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=80,
        max_position_embeddings=64,
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.2,
        initializer_range=0.2,
    )
    objectives = {
        kind: head_settings(kind, ObjectiveRecipe(kind=kind), config) for kind in OBJECTIVES
    }
    return MultitaskModel(
        config,
        [FORMATS["sst"]],
        {"sst": "single"},
        pooling="mean",
        dropout_p=0.1,
        adapter_width=12,
        objectives=objectives,
    )
