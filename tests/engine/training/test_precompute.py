"""A frozen encoder's states, computed once, are what the encoder gives."""

import json

import numpy as np
import pytest
import torch

from engine.data.collate import pack
from engine.models.encoder import Encoder
from engine.runs.run import open_run
from engine.runs.scoring import predict
from engine.training.precompute import precompute_hidden_states

from ..whole_runs import metrics, trained_weights

HEADS = (
    "freeze_encoder=true",
    *("tasks.sst.head=bilstm", "tasks.quora.head=shared", "tasks.sts.head=cross"),
)


@pytest.fixture
def frozen_run(tiny_run):
    return tiny_run("run", "--max-steps", "3", settings=HEADS)


def test_predictions_are_the_same_by_states_and_by_tokens(frozen_run):
    run = open_run(frozen_run)
    model, _ = run.trained_model(torch.device("cpu"))
    for task in run.recipe.tasks:
        split = run.split(task, "dev")
        stored = precompute_hidden_states(model, split)
        tokens_kept = task == "sst"  # the BiLSTM reads them
        assert len(stored.states) == (len(split.tokens) if tokens_kept else len(split.lengths))
        np.testing.assert_allclose(
            predict(model, stored), predict(model, split), rtol=1e-5, atol=1e-5
        )


def test_a_batch_brings_the_states_of_its_examples(frozen_run):
    run = open_run(frozen_run)
    model, _ = run.trained_model(torch.device("cpu"))
    splits = [run.split(task, "dev") for task in ("sst", "quora")]
    picks = [np.array([7, 3]), np.array([11, 2, 5])]
    by_tokens = pack(splits, picks)
    by_states = pack([precompute_hidden_states(model, split) for split in splits], picks)
    with torch.no_grad():
        expected = model(by_tokens, ("sst", "quora"))
        found = model(by_states, ("sst", "quora"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_is_frozen_keeps_its_precision(tiny_run, precision):
    """A phase that trains the heads alone, and then one that starts from its weights."""
    settings = ("phases.heads.freeze_encoder=true", "phases.all.lr=1e-12", f"precision={precision}")
    folder = tiny_run("run", "--max-steps", "1", settings=settings)
    run = open_run(folder)
    before = run.initial_model().state_dict()
    best, _ = run.trained_model(torch.device("cpu"), torch.float32)
    for weights in (trained_weights(folder), best.state_dict()):
        for name, tensor in before.items():
            if name.startswith("encoder."):  # but for the update of 1e-12
                torch.testing.assert_close(weights[name], tensor, rtol=1e-6, atol=1e-8)


def test_training_never_runs_the_frozen_encoder(frozen_run, tiny_run, monkeypatch):
    before = open_run(frozen_run).initial_model().state_dict()
    after = trained_weights(frozen_run)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) == name.startswith("encoder."), name

    steps = 0
    forward = Encoder.forward

    def count(*arguments, **named):
        nonlocal steps
        steps += arguments[0].training
        return forward(*arguments, **named)

    monkeypatch.setattr(Encoder, "forward", count)
    again = tiny_run("again", "--max-steps", "3", settings=HEADS)
    assert steps == 0
    assert metrics(again) == metrics(frozen_run)


def test_adapters_learn_beside_a_frozen_encoder(tiny_run):
    folder = tiny_run(
        "run", "--max-steps", "3", settings=("freeze_encoder=true", "adapter_width=8")
    )
    before = open_run(folder).initial_model().state_dict()
    after = trained_weights(folder)
    assert not torch.equal(after["adapters.sst.up.weight"], before["adapters.sst.up.weight"])
    assert torch.equal(after["encoder.layers.0.qkv.weight"], before["encoder.layers.0.qkv.weight"])
    scores = json.loads((folder / "metrics.json").read_text())["scores"]
    assert scores.keys() >= {"sst", "quora", "sts"}
