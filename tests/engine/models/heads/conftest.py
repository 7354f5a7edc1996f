"""Heads are drawn alike in every test; a small model with a head of every objective."""

import pytest
import torch

from engine.data.tokenizer import Tokenizer
from engine.models.multitask import MultitaskModel

from .cases import TEXTS, model_of_objectives


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 90)


@pytest.fixture
def model(tokenizer) -> MultitaskModel:
    return model_of_objectives()
