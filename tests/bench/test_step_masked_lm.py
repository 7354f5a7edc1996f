"""Steps of masked language modelling beside run_mlm's: their batches; no figure is asserted."""

import json
import sys
from argparse import Namespace

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from bench import step, step_masked_lm
from bench.batching import pad
from bench.step_masked_lm import CASES, Case, Collator
from engine.utils.errors import InputError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def options():
    return Namespace(device="cpu", masked_lm=512, data=None, init=None, rounds=4, compile=False)


@pytest.fixture(scope="module")
def trainer(options):
    return step_masked_lm.engine_trainer(options, CASES[0], "fp32")


@pytest.fixture(scope="module")
def texts(trainer):
    return trainer.run.objective("text")


@pytest.fixture
def collate(trainer, tmp_path):
    torch.manual_seed(0)
    return Collator(trainer.run.tokenizer, tmp_path / "tokenizer")


def framed(texts, number: int) -> list[int]:
    own = texts.examples[number].first.tolist()
    return [texts.tokenizer.cls_id, *own, texts.tokenizer.sep_id]


def test_sentences_are_those_of_the_engines_batch(trainer, texts, collate):
    ours = step_masked_lm.engine_batches(trainer, 3)
    theirs = step_masked_lm.peer_batches(CASES[0], ours, texts, collate, 512, CPU)
    sampler = trainer.samplers[0]
    for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        expected = [framed(texts, index) for index in sampler.batch(number).tolist()]
        assert step_masked_lm.unmasked(own.inputs) == expected
        assert own.tokens == other.tokens == sum(map(len, expected))
        assert other.places == len(expected) * max(map(len, expected))
        inputs = other.inputs
        assert int(inputs["attention_mask"].sum()) == other.tokens
        kept = torch.where(inputs["labels"] >= 0, inputs["labels"], inputs["input_ids"])
        rows = zip(kept.tolist(), inputs["attention_mask"].sum(dim=1).tolist(), strict=True)
        assert [row[:length] for row, length in rows] == expected


def test_blocks_are_all_texts_cut(texts):
    every = [token for number in range(len(texts)) for token in framed(texts, number)]
    blocks = step_masked_lm.blocks(texts, 100)
    assert [token for block in blocks for token in block] == every[: len(every) // 100 * 100]
    assert {len(block) for block in blocks} == {100}


def test_the_same_loss_of_the_same_masks(trainer, tmp_path):
    """Of a model without dropout; the step of transformers is given the engine's own masks."""
    folder = tmp_path / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(
        vocab_size=trainer.run.tokenizer.vocab_size, intermediate_size=48, **sizes, **off
    )
    BertForMaskedLM(config).save_pretrained(folder)
    trainer.run.tokenizer.save(folder)
    options = Namespace(device="cpu", masked_lm=512, data=None, init=folder)
    engine = step_masked_lm.engine_trainer(options, CASES[0], "fp32")
    (batch,) = step_masked_lm.engine_batches(engine, 1)
    lengths, (labels,) = batch.inputs.cu_seqlens.diff().tolist(), batch.inputs.labels
    targets = torch.full_like(batch.inputs.input_ids, -100)
    targets[labels.positions] = labels.targets
    ids, mask = pad(batch.inputs.input_ids.split(lengths))
    own, _ = pad(targets.split(lengths))
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": own.where(mask > 0, -100)}
    loop = step_masked_lm.MaskedLmLoop(folder, {}, autocast=False, device=CPU)
    expected = loop(inputs)
    (loss,) = engine.step(batch.inputs, 0, 1e-5).losses
    # Sums of a few hundred terms in other orders.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", [CASES[0], Case("blocks of 64", 64, joined=True)], ids=str)
def test_as_many_tokens_and_masks(case, options, texts, collate):
    trainer = step_masked_lm.engine_trainer(options, case, "fp32")
    ours = step_masked_lm.engine_batches(trainer, 40)
    theirs = step_masked_lm.peer_batches(case, ours, texts, collate, 512, CPU)
    special = {texts.tokenizer.cls_id, texts.tokenizer.sep_id}
    tokens, masked = [], []
    for batches in (ours, theirs):
        tokens.append(sum(batch.tokens for batch in batches))
        masked.append(sum(batch.masked for batch in batches))
    # A batch begins and ends within a sequence of up to 128 tokens.
    assert tokens[0] == pytest.approx(40 * 512, abs=128)
    assert tokens[1] == (tokens[0] if not case.joined else 40 * 512)
    words = [0, 0]
    for batch in ours:
        sequences = step_masked_lm.unmasked(batch.inputs)
        words[0] += sum(token not in special for row in sequences for token in row)
    for batch in theirs:
        inputs = batch.inputs
        kept = torch.where(inputs["labels"] >= 0, inputs["labels"], inputs["input_ids"])
        own = kept[inputs["attention_mask"] > 0].tolist()
        words[1] += sum(token not in special for token in own)
    # Six standard deviations of the collator's draws; the engine rounds the share of a sequence.
    allowed = 6 * (words[1] * 0.15 * 0.85) ** 0.5 / words[1]
    assert masked[1] / words[1] == pytest.approx(0.15, abs=allowed)
    assert masked[0] / words[0] == pytest.approx(0.15, abs=0.02)


def test_a_step_larger_than_the_texts(texts, collate):
    case = Case("blocks of 64", 64, joined=True)
    with pytest.raises(InputError, match=r"--masked-lm 63: .* give 64 to "):
        step_masked_lm.peer_batches(case, [], texts, collate, 63, CPU)
    with pytest.raises(InputError, match="--masked-lm 99999999"):
        step_masked_lm.peer_batches(case, [], texts, collate, 99_999_999, CPU)


@pytest.mark.long
def test_every_case_is_in_the_record(monkeypatch, tmp_path):
    path = tmp_path / "record.json"
    given = ["bench.step", "--device", "cpu", "--rounds", "2", "--json", str(path), "--no-compile"]
    monkeypatch.setattr(sys, "argv", [*given, "--masked-lm", "512", "--only", "fp32"])
    step.main()
    record = json.loads(path.read_text())
    assert record["benchmark"] == "step, masked lm"
    results = record["results"]
    assert results["failures"] == {}
    assert results["tokens_per_batch"] == 512
    # The demo's encoder has 128 positions.
    assert [measured["case"] for measured in results["cases"]] == ["sentences", "blocks of 128"]
    names = {"this engine, fp32", "transformers, fp32", "transformers, fp32, accelerated"}
    for measured in results["cases"]:
        for field in ("seconds", "peak_bytes", "tokens", "masked", "places"):
            assert measured[field].keys() == names
        for name in names:
            rates = step_masked_lm.tokens_per_second(measured, name)
            assert len(rates) == 2
            assert all(rate > 0 for rate in rates)


def test_only_one_of_the_other_measurements(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.step", "--growth", "--masked-lm", "512"])
    with pytest.raises(SystemExit) as stop:
        step.main()
    assert stop.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
