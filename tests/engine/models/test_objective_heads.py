"""Objectives beside tasks: their rows, their losses."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.config.objective import ObjectiveRecipe
from engine.data.batch_shapes import ShapePlan
from engine.data.collate import pack
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.gradients.flat_parameters import FlatParameters
from engine.models.config import EncoderConfig
from engine.models.masked_lm import MaskedLmHead
from engine.models.multitask import MultitaskModel
from engine.runs.objectives import build_examples, build_head

from ..gradients.test_one_pass_backward import within_twice
from ..small_models import random_split

TEXTS = [f"the film {n} was fine. i saw it {n} times. it is {n * n}!" for n in range(12)]
KINDS = ("masked_lm", "masked_lm_next", "simcse")
SEED = torch.tensor(5)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 90)


@pytest.fixture
def model(tokenizer) -> MultitaskModel:
    torch.manual_seed(0)
    config = EncoderConfig(
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
    objectives = {kind: build_head(ObjectiveRecipe(kind=kind), config) for kind in KINDS}
    return MultitaskModel(
        config,
        [FORMATS["sst"]],
        {"sst": "single"},
        pooling="mean",
        dropout_p=0.1,
        adapter_width=12,
        objectives=objectives,
    )


def batch_of(tokenizer, names, step: int = 0, plan: ShapePlan | None = None):
    sources = [
        random_split("sst", 5, vocab=97, seed=1)
        if name == "sst"
        else build_examples(name, ObjectiveRecipe(kind=name), TEXTS, tokenizer, 64, 0)
        for name in names
    ]
    return pack(sources, [np.arange(5)] * len(names), step, plan)


def expected_rows(model, batch, names):
    """K ordinary backward passes."""
    parameters = dict(model.named_parameters())
    losses = model.losses(model(batch, names, seed=SEED), batch, names)
    rows = {
        name: torch.zeros(len(names), *p.shape, dtype=p.dtype) for name, p in parameters.items()
    }
    for k, loss in enumerate(losses):
        gradients = torch.autograd.grad(
            loss, list(parameters.values()), retain_graph=True, allow_unused=True
        )
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                rows[name][k] = gradient
    return rows


@pytest.mark.parametrize("names", [("sst", *KINDS), ("masked_lm_next",)], ids=str)
def test_rows_equal_k_backward_passes_step_after_step(model, tokenizer, names):
    """Twice, since the tied decoder fills the whole of a word table's row each time."""
    model.train()
    exact, same = copy.deepcopy(model).double(), copy.deepcopy(model)
    flat = FlatParameters(model, names, device=torch.device("cpu"), compute_dtype=torch.float32)
    for step in range(2):
        batch = batch_of(tokenizer, names, step)
        flat.clear_partial_gradients()
        scores = model(batch, names, seed=SEED, task_rows=True)
        torch.stack(model.losses(scores, batch, names)).sum().backward()
        references, plain = (expected_rows(m, batch, names) for m in (exact, same))
        scale = max(row.norm() for row in references.values())
        for name, row in flat.named_views(flat.rows):
            assert within_twice(row, plain[name], references[name], scale), (step, name)
        model.encoder.embeddings.wipe_rows(batch, batch.token_offsets)


def test_filled_batches_have_the_same_losses(model, tokenizer):
    """Padding tokens and masks that do not count, as batches of few shapes have them."""
    names = ("sst", *KINDS)
    model.eval()
    plain = batch_of(tokenizer, names)
    counts = np.diff(plain.token_offsets)[None] + np.array([[3, 40, 1, 9]])
    filled = batch_of(tokenizer, names, plan=ShapePlan({names: counts}, 1, 64))
    assert filled.num_tokens > plain.num_tokens
    for masked in (1, 2):
        assert len(filled.labels[masked].targets) % 64 == 0
    with torch.no_grad():
        losses = [model.losses(model(b, names), b, names) for b in (plain, filled)]
    for ours, theirs in zip(*losses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_masked_lm_is_that_of_transformers(model, tokenizer):
    """The head on the same states, with the weights under the names of a pretrained model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=97, hidden_size=48, layer_norm_eps=1e-12)
    torch.manual_seed(1)
    theirs = transformers.models.bert.modeling_bert.BertPreTrainingHeads(config).eval()
    theirs.predictions.bias.data.normal_()
    pooler = transformers.models.bert.modeling_bert.BertPooler(config).eval()
    table = model.encoder.embeddings.word.weight
    theirs.predictions.decoder.weight = table
    theirs.predictions.decoder.bias = theirs.predictions.bias  # tied, as in a whole model
    state = {f"cls.{name}": t for name, t in theirs.state_dict().items()}
    state |= {f"pooler.{name}": t for name, t in pooler.state_dict().items()}
    head = model.heads["masked_lm_next"]
    assert isinstance(head, MaskedLmHead)
    assert head.load_pretrained(state)

    batch = batch_of(tokenizer, ("masked_lm_next",))
    labels = batch.labels[0]
    model.eval()
    hidden = model.encoder(batch)
    words, follows = theirs(hidden, pooler(hidden[batch.cu_seqlens[:-1].long()][:, None]))
    expected = F.cross_entropy(words[labels.positions], labels.targets)
    # Their class 0 says that the second segment follows.
    expected = expected + F.cross_entropy(follows, 1 - labels.is_next.long())
    (ours,) = model(batch, ("masked_lm_next",))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_head_without_pretraining_stays_as_it_is(model):
    head = model.heads["masked_lm"]
    before = copy.deepcopy(head.state_dict())
    assert not head.load_pretrained({"pooler.dense.bias": torch.ones(48)})
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in before.items())


def test_simcse_is_its_formula_and_its_copies_differ(model, tokenizer):
    model.train()
    batch = batch_of(tokenizer, ("simcse",))
    (loss,) = model(batch, ("simcse",), seed=SEED)
    hidden = model.encoder(batch, seed=SEED).double()
    bounds = batch.cu_seqlens.tolist()
    pooled = [hidden[a:b].mean(0) for a, b in pairwise(bounds)]
    first, second = pooled[:5], pooled[5:]
    assert not any(torch.allclose(u, v) for u, v in zip(first, second, strict=True))
    losses = []
    for i, u in enumerate(first):
        powers = [torch.exp(F.cosine_similarity(u, v, dim=0) / 0.05) for v in second]
        losses.append(-torch.log(powers[i] / sum(powers)))
    torch.testing.assert_close(loss.double(), sum(losses) / 5, rtol=1e-5, atol=1e-6)
