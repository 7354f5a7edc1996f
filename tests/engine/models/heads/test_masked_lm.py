"""Masked LM and next sentence prediction against transformers' heads."""

import copy

import pytest
import torch
from torch.nn import functional as F

from engine.models.context import Context

from .cases import batch_of


def test_masked_lm_is_that_of_transformers(model, tokenizer):
    """The head on the same states, with the weights under the names of a pretrained model."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=97, hidden_size=48, layer_norm_eps=1e-12)
    torch.manual_seed(1)
    theirs = transformers.models.bert.modeling_bert.BertPreTrainingHeads(config).eval()
    theirs.predictions.bias.data.normal_()
    pooler = transformers.models.bert.modeling_bert.BertPooler(config).eval()
    table = model.encoder.word_table.weight
    theirs.predictions.decoder.weight = table
    theirs.predictions.decoder.bias = theirs.predictions.bias  # tied, as in a whole model
    state = {f"cls.{name}": t for name, t in theirs.state_dict().items()}
    state |= {f"pooler.{name}": t for name, t in pooler.state_dict().items()}
    head = model.heads["masked_lm_next"]
    assert head.load_pretrained(state)

    batch = batch_of(tokenizer, ("masked_lm_next",))
    labels = batch.labels[0]
    model.eval()
    hidden = model.encoder(batch.input_ids, Context.of(batch))
    words, follows = theirs(hidden, pooler(hidden[batch.cu_seqlens[:-1].long()][:, None]))
    expected = F.cross_entropy(words[labels.positions], labels.targets)
    # Their class 0 says that the second segment follows.
    expected = expected + F.cross_entropy(follows, 1 - labels.is_next.long())
    names = ("masked_lm_next",)
    (ours,) = model.losses(model(batch, names), batch, names)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_head_without_pretraining_stays_as_it_is(model):
    head = model.heads["masked_lm"]
    before = copy.deepcopy(head.state_dict())
    assert not head.load_pretrained({"pooler.dense.bias": torch.ones(48)})
    assert all(torch.equal(head.state_dict()[name], tensor) for name, tensor in before.items())


def test_it_fills_masks_and_answers_nothing(model):
    head = model.head("masked_lm")
    assert head.fills_masks
    assert not head.is_scored
    assert head.exported() is None
    assert model.head("sst").is_scored
    with pytest.raises(TypeError, match="an objective answers nothing"):
        head.predict(torch.zeros(1))
    with pytest.raises(TypeError, match="sst: fills no masks"):
        model.head("sst").word_logits(torch.zeros(1, 48), model.encoder.word_table)
