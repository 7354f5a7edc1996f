"""Projected attention layers against their equation, token by token."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.collate import pack
from engine.models.adapters import AdaptersOfBatch, ProjectedAttention
from engine.models.bert import BertConfig, BertEncoder
from engine.models.context import Context
from engine.models.layers import LayerNorm

from ..small_models import random_split

TASKS = ("sst", "quora")
WIDTH, NARROW, HEADS, LAYERS = 48, 12, 3, 2
CONFIG = BertConfig(
    vocab_size=97,
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    intermediate_size=80,
    max_position_embeddings=32,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    initializer_range=0.2,
)


@pytest.fixture
def encoder() -> BertEncoder:
    torch.manual_seed(0)
    return BertEncoder(CONFIG).eval()


@pytest.fixture
def adapters() -> list[ProjectedAttention]:
    torch.manual_seed(1)
    made = [ProjectedAttention(CONFIG, NARROW, first_dropout_id=99).eval() for _ in range(2)]
    for adapter in made:
        adapter.up.weight.data.normal_(0, 0.2)  # past its beginning at zero
    return made


@pytest.fixture
def batch():
    splits = [random_split(task, 4, vocab=97, seed=seed) for seed, task in enumerate(TASKS)]
    return pack(splits, [np.arange(4)] * 2)


def encode(encoder: BertEncoder, batch, adapters=None) -> Tensor:
    of_batch = None if adapters is None else AdaptersOfBatch.of(adapters, batch)
    return encoder(batch.input_ids, Context.of(batch, adapters=of_batch))


def attention(qkv: Tensor) -> Tensor:
    """Attention over one sequence, from ``[L, 3 * width]`` to ``[L, width]``, head by head."""
    heads = []
    for q, k, v in zip(*(x.chunk(HEADS, dim=1) for x in qkv.chunk(3, dim=1)), strict=True):
        heads.append((q @ k.t() / q.shape[1] ** 0.5).softmax(1) @ v)
    return torch.cat(heads, dim=1)


def adapter_output(adapter: ProjectedAttention, layer: int, hidden: Tensor) -> Tensor:
    """What an adapter adds for one sequence, ``[L, WIDTH]``."""
    return adapter.up(attention(adapter.qkv[layer](adapter.down(hidden))))


def normed(x: Tensor, norm: LayerNorm) -> Tensor:
    return F.layer_norm(x, (WIDTH,), norm.weight, norm.bias, norm.eps)


def test_each_task_has_its_own_attention_beside_every_layer(encoder, adapters, batch):
    """The same two projections in all layers; queries, keys and values of each layer's own."""
    bounds = list(pairwise(batch.cu_seqlens.tolist()))
    task_of = np.repeat([0, 1], np.diff(batch.task_offsets))
    with torch.no_grad():
        found = encode(encoder, batch, adapters)
        hidden = encoder.embeddings(batch.input_ids, Context.of(batch))
        for number, layer in enumerate(encoder.layers):
            added = [
                adapter_output(adapters[task], number, hidden[start:end])
                for task, (start, end) in zip(task_of, bounds, strict=True)
            ]
            attended = [attention(layer.qkv(hidden[start:end])) for start, end in bounds]
            middle = normed(
                hidden + layer.attention_output(torch.cat(attended)), layer.attention_norm
            )
            widened = F.gelu(layer.intermediate(middle))
            hidden = normed(middle + layer.output(widened) + torch.cat(added), layer.output_norm)
    torch.testing.assert_close(found, hidden, rtol=1e-4, atol=1e-5)


def test_projections_are_shared_over_the_layers(adapters):
    sizes = {name: tuple(p.shape) for name, p in adapters[0].named_parameters()}
    matrices = {"down.weight": (NARROW, WIDTH), "up.weight": (WIDTH, NARROW)}
    matrices |= {f"qkv.{layer}.weight": (3 * NARROW, NARROW) for layer in range(LAYERS)}
    assert {name: size for name, size in sizes.items() if len(size) == 2} == matrices


def test_training_starts_from_the_plain_encoder(encoder, batch):
    fresh = [ProjectedAttention(CONFIG, NARROW, first_dropout_id=99).eval() for _ in range(2)]
    with torch.no_grad():
        plain = encode(encoder, batch)
        adapted = encode(encoder, batch, fresh)
    torch.testing.assert_close(adapted, plain, rtol=0, atol=0)
