"""Heads are drawn alike in every test; a small model with a head of every objective."""

import pytest
import torch

from engine.config.objective import ObjectiveRecipe
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.models.bert import BertConfig
from engine.models.multitask import MultitaskModel
from engine.runs.objectives import head_settings

from .cases import OBJECTIVES, TEXTS


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 90)


@pytest.fixture
def model(tokenizer) -> MultitaskModel:
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
