"""The step benchmark runs and keeps what it measured; no figure is asserted."""

import json
import sys
from argparse import Namespace

import pytest
import torch

from bench import plot, random_encoder, step, step_growth
from bench.baselines import HuggingFaceLoop
from engine.utils.errors import InputError


def run(monkeypatch, tmp_path, *arguments: str) -> dict:
    path = tmp_path / "record.json"
    given = ["bench.step", "--device", "cpu", "--rounds", "2", "--json", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", given)
    step.main()
    return json.loads(path.read_text())


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_every_contestant_and_its_floor(monkeypatch, tmp_path):
    record = run(monkeypatch, tmp_path, "--batch-size", "2", "--no-compile")
    assert record["environment"]["commit"]
    results = record["results"]
    names = results["seconds"].keys()
    assert {"this engine, fp32, pcgrad", "this engine, fp32, sum"} <= names
    assert {"transformers, fp32, published PCGrad", "transformers, bf16, sum"} <= names
    assert {"transformers, fp32, packed, sum", "transformers, fp32, sorted by length, sum"} <= names
    assert results["best_peers"].keys() == {"sum", "published PCGrad"}
    assert all(peer["name"] in names for peer in results["best_peers"].values())
    assert all(len(seconds) == 2 for seconds in results["seconds"].values())
    assert results["peak_bytes"].keys() == names
    assert results["floor_seconds"].keys() == {"matrix products", "surgery and update"}
    assert len(results["floor_samples"]) == 2  # in turns with the contestants
    assert all(seconds > 0 for seconds in results["phase_seconds"].values())


def test_best_peers():
    seconds = {
        "this engine, bf16, sum": [1.0, 1.0],
        "transformers, bf16, sum": [3.0, 9.0, 3.0],
        "transformers, fp32, packed, sum": [4.0, 4.0, 1.0],
        "transformers, bf16, accelerated, sum": [2.0, 2.0],
        "transformers, bf16, accelerated, TaskGradients, PCGrad": [2.0, 2.0],
        "transformers, fp32, TorchJD PCGrad": [2.0, 2.0],
        "transformers, fp32, published PCGrad": [7.0, 7.0],
    }
    assert step.best_peers(seconds) == {
        "sum": {"name": "transformers, bf16, sum", "relative": 3},
        "published PCGrad": {"name": "transformers, fp32, published PCGrad", "relative": 7},
    }
    assert step.best_peers({"this engine, bf16, sum": [1.0]}) == {}


def test_growth(monkeypatch, tmp_path):
    cases = {"tasks": [step_growth.Case("tiny", tasks, 2) for tasks in (2, 5)]}
    monkeypatch.setattr(step_growth, "CASES", cases)
    record = run(monkeypatch, tmp_path, "--growth")
    small, large = record["results"]["tasks"]
    assert (small["num_tasks"], large["num_tasks"]) == (2, 5)
    assert large["seconds"].keys() == {"pcgrad", "sum"}
    assert plot.draw(record).startswith(b"\x89PNG")


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """A folder with a small vocabulary; every published shape has two narrow layers."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shapes = {
        name: {**fields, **sizes, "intermediate_size": 48}
        for name, fields in random_encoder.SHAPES.items()
    }
    monkeypatch.setattr(random_encoder, "SHAPES", shapes)
    monkeypatch.setattr(random_encoder, "LEAST_VOCABULARY", {"bert": 0, "modernbert": 64})
    folder = tmp_path / "model"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("shape", ["bert-base", "modernbert-base"])
def test_encoder_of_a_published_shape(shape, vocabulary, monkeypatch, tmp_path):
    record = run(
        *(monkeypatch, tmp_path, "--encoder", shape, "--init", str(vocabulary)),
        *("--batch-size", "2", "--no-compile", "--only", "fp32, (pcgrad|sum|accelerated)"),
    )
    results = record["results"]
    assert f"{results['encoder']['model_type']}-base" == shape
    assert results["encoder"]["vocab_size"] == (33 if shape == "bert-base" else 64)
    expected = {
        "this engine, fp32, pcgrad",
        "this engine, fp32, sum",
        "transformers, fp32, sum",
        "transformers, fp32, accelerated, sum",
        "transformers, fp32, accelerated, TaskGradients, PCGrad",
    }
    assert results["seconds"].keys() == expected


def test_encoder_needs_a_vocabulary(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="--encoder: needs --init"):
        run(monkeypatch, tmp_path, "--encoder", "bert-base")
    with pytest.raises(InputError, match=r"vocab\.txt: No such file"):
        run(monkeypatch, tmp_path, "--encoder", "bert-base", "--init", str(tmp_path))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("balance", ["sum", "task gradients"])
def test_loops_of_modernbert_agree(balance, precision, vocabulary, tmp_path, monkeypatch):
    """Padded, and accelerated, all tasks apart or in one pass: the same losses of a first step.

    The engine fills up the batches that oneDNN computes in bf16; the loops, here in fp32, do not
    see that.
    """
    multiples = {torch.float32: 1, torch.bfloat16: 32}
    monkeypatch.setattr("engine.training.trainer.token_multiple", multiples.__getitem__)
    folder = tmp_path / "encoder"
    random_encoder.write(folder, "modernbert-base", vocabulary / "vocab.txt")
    options = Namespace(batch_size=3, data=None, init=folder, device="cpu")
    cpu = torch.device("cpu")
    batches = step.Batches(step.engine_trainer(options, "sum", precision, "eager"), cpu, 1)
    assert (batches.packed[0].padding > 0) == (precision == "bf16")
    losses = []
    for way in ({"balance": "sum"}, {"balance": balance, "accelerated": True}):
        torch.manual_seed(0)
        loop = HuggingFaceLoop(folder, autocast=False, device=cpu, **way)
        torch.manual_seed(0)  # of the dropout before the heads; the encoder has none
        losses.append(loop.step(batches.padded))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
