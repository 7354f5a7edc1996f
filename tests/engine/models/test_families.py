"""Every model type of BERT's family comes in as the BERT that it equals, and goes out as one."""

import json
import math
import re
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from engine import export, train
from engine.data.collate import PackedBatch, pack
from engine.data.demo import write_demo
from engine.data.split import tokenize
from engine.data.table import Table, read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.fill import likeliest
from engine.models import hf_weights
from engine.models.bert import BertConfig, BertEncoder
from engine.models.context import Context
from engine.models.families import FAMILIES
from engine.runs.run import open_run
from engine.utils.errors import InputError
from tests.engine.conftest import SHORT

from .byte_pairs import byte_pairs

# transformers and sentence-transformers warn of what they deprecate themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 32,
    "embedding_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 42,
    "initializer_range": 0.3,
}
DISTILLED = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
WORD_PIECES = ("bert", "distilbert", "electra")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    form = FORMATS["sst"]
    return read_table(form.file(folder, "train"), form).sentences[0]


@pytest.fixture
def folder(tmp_path: Path, texts: list[str]) -> Callable[..., Path]:
    """Write a model folder of a family, by transformers."""

    def write(family: str, head: str = "AutoModel", **fields: object) -> Path:
        path = tmp_path / family
        shape = {**SHAPE, **(DISTILLED if family == "distilbert" else {}), **fields}
        torch.manual_seed(0)
        getattr(hf, head).from_config(hf.AutoConfig.for_model(family, **shape)).save_pretrained(
            path
        )
        if family in WORD_PIECES:
            Tokenizer.train(texts, 300).save(path)
        else:
            byte_pairs(texts).save(str(path / "tokenizer.json"))
        return path

    return write


def batch_of(path: Path, texts: list[str]) -> PackedBatch:
    """Sentences as the engine tokenizes them for the model in a folder."""
    table = Table([str(number) for number in range(len(texts))], (texts,), None)
    limit = hf_weights.read_config(path).max_position_embeddings
    split = tokenize("sst", table, Tokenizer.load(path), limit)
    return pack([split], [np.arange(len(texts))])


def assert_same_states(path: Path, texts: list[str]) -> None:
    """Hold the encoder on packed tokens against transformers' model on each sentence."""
    config = hf_weights.read_config(path)
    encoder, theirs = BertEncoder(config).eval(), hf.AutoModel.from_pretrained(path).eval()
    encoder.load_state_dict(hf_weights.load_encoder_state(path, config))
    batch = batch_of(path, texts)
    lengths = batch.cu_seqlens.diff().tolist()
    assert max(lengths) == config.max_position_embeddings
    with torch.inference_mode():
        both = zip(
            encoder(batch.input_ids, Context.of(batch)).split(lengths),
            batch.input_ids.split(lengths),
            strict=True,
        )
        for ours, ids in both:
            assert (ours - theirs(ids[None]).last_hidden_state[0]).abs().max() < 1e-5


@pytest.mark.parametrize("head", ["AutoModel", "AutoModelForQuestionAnswering"])
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(folder, texts, family, head) -> None:
    assert_same_states(folder(family, head), [*texts[:20], "the plot " * 30])


def test_a_name_on_the_hub_brings_what_is_needed(folder, tmp_path, monkeypatch) -> None:
    there = folder("roberta")
    (there / "pytorch_model.bin").write_bytes(b"pickle")
    here = tmp_path / "downloaded"

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "org/roberta"
        here.mkdir()
        for path in there.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, here)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hf_weights.resolve("org/roberta") == here
    assert not (here / "pytorch_model.bin").exists()
    config = hf_weights.read_config(here)
    assert hf_weights.load_encoder_state(here, config)
    assert Tokenizer.load(here).special_tokens[0] == "<pad>"


def test_token_ids_are_those_of_transformers(folder, texts) -> None:
    path = folder("roberta")
    expected = hf.AutoTokenizer.from_pretrained(path)(texts[:20])["input_ids"]
    assert batch_of(path, texts[:20]).input_ids.tolist() == [i for row in expected for i in row]


@pytest.mark.parametrize("max_length", [64, 17, 16])
def test_pairs_in_one_sequence_are_those_of_transformers(folder, texts, max_length) -> None:
    """Short and long pairs, of which the first, the second or both are cut."""
    path, long = folder("roberta"), " ".join(texts[:5])
    first = [*texts[:20], long, texts[0], long, f"{texts[0]} {texts[1]}"]
    second = [*texts[20:40], texts[0], long, long, f"{texts[2]} {texts[3]}"]
    theirs = hf.AutoTokenizer.from_pretrained(path)
    expected = theirs(first, second, truncation="longest_first", max_length=max_length)
    tokenizer, table = Tokenizer.load(path), Table(["-"] * 24, (first, second), None)
    found = tokenize("quora", table, tokenizer, max_length, joins_pairs=True)
    rows = np.split(found.tokens, found.offsets[1:-1])
    assert [row.tolist() for row in rows] == expected["input_ids"]
    assert found.token_types is None


def test_one_token_type_becomes_two_alike(folder, texts) -> None:
    path = folder("roberta", type_vocab_size=1)
    config = hf_weights.read_config(path)
    table = hf_weights.load_encoder_state(path, config)["embeddings.token_type.weight"]
    assert (config.type_vocab_size, len(table)) == (2, 2)
    assert torch.equal(table[0], table[1])
    assert_same_states(path, [*texts[:5], "the plot " * 30])


@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_a_run_is_exported_as_a_bert(folder, texts, tmp_path, family) -> None:
    arguments = ["demo", "--init", str(folder(family)), "--out", str(tmp_path / "run")]
    assert train.main([*arguments, "--max-steps", "2", "--set", *SHORT]) == 0
    assert export.main([str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    theirs, report = hf.AutoModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert isinstance(theirs, hf.BertModel)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours, _ = open_run(tmp_path / "run").trained_model(torch.device("cpu"))
    batch = batch_of(tmp_path / "run", texts[:4])
    given = hf.AutoTokenizer.from_pretrained(tmp_path / "model")(
        texts[:4], return_tensors="pt", padding=True
    )
    mask = given["attention_mask"].bool()
    assert torch.equal(given["input_ids"][mask], batch.input_ids)
    with torch.inference_mode():
        expected = theirs.eval()(**given).last_hidden_state
        states = ours.encoder(batch.input_ids, Context.of(batch))
    assert (states - expected[mask]).abs().max() < 1e-5
    vectors = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts[:4])
    means = (expected * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    assert np.abs(vectors - means.numpy()).max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_the_head_of_masked_lm_comes_along(folder, tmp_path, family) -> None:
    path = folder(family, "AutoModelForMaskedLM")
    arguments = ["superbert", "--init", str(path), "--out", str(tmp_path / "run")]
    assert train.main([*arguments, "--max-steps", "1", "--set", *SHORT]) == 0
    run = open_run(tmp_path / "run")
    words = likeliest(
        run.initial_model().eval(), "masked_lm", run.tokenizer, "the plot was [MASK] .", 3
    )
    theirs = hf.AutoModelForMaskedLM.from_pretrained(path).eval()
    ids = batch_of(path, [f"the plot was {run.tokenizer.special_tokens[-1]} ."]).input_ids
    (place,) = (ids == run.tokenizer.mask_id).nonzero()
    with torch.inference_mode():
        shares = theirs(ids[None]).logits[0, place.item()].softmax(0)
    for word, share in words:
        assert share == pytest.approx(shares[run.tokenizer.token_to_id(word)].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mpnet", {}, "model_type = 'mpnet': expected one of bert, camembert, distilbert, electra"),
        ("electra", {"embedding_size": 16}, "embedding_size = 16: expected hidden_size, 32"),
        ("roberta", {"pad_token_id": "one"}, "pad_token_id = 'one': expected a whole number"),
        ("xlm-roberta", {"max_position_embeddings": 2}, "max_position_embeddings = 0"),
    ],
)
def test_models_that_are_no_bert(tmp_path, family, fields, message) -> None:
    config = {**SHAPE, "model_type": family, **fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=re.escape(message)) as error:
        hf_weights.read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_size_that_is_no_number() -> None:
    shape = {**SHAPE, "hidden_size": math.nan}
    del shape["embedding_size"]
    with pytest.raises(InputError, match="hidden_size = nan: expected a whole number"):
        BertConfig.from_huggingface(shape)


def test_weights_that_belong_to_nothing_are_named(folder) -> None:
    path = folder("roberta")
    state = load_file(path / "model.safetensors") | {"encoder.relative.weight": torch.zeros(2)}
    save_file(state, path / "model.safetensors")
    with pytest.raises(InputError, match=r"encoder\.relative\.weight is not part of an encoder"):
        hf_weights.load_encoder_state(path, hf_weights.read_config(path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_heads_of_pretraining_that_are_not_finite_are_refused(tmp_path, value):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    tensors = {"cls.predictions.bias": torch.tensor([0, value], dtype=torch.float64)}
    save_file(tensors | {"cls.count": torch.tensor([1])}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"weight cls\.predictions\.bias holds values that are no"):
        hf_weights.load_pretraining_heads(tmp_path)
