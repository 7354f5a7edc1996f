"""The benchmark of long texts: its texts, its options; no figure is asserted."""

import argparse
import csv
import json
import sys

import pytest

from bench import long_text, random_encoder
from bench.long_text import Case
from engine.utils.errors import InputError


@pytest.fixture
def data(tmp_path):
    """CFIMDB's files with reviews of seven words."""
    for split in ("train", "dev"):
        rows = [f"{i}\t{i}\tthis film is number {i} of some\t{i % 2}" for i in range(200)]
        text = "\n".join(["\tid\tsentence\tsentiment", *rows]) + "\n"
        (tmp_path / f"ids-cfimdb-{split}.csv").write_text(text, encoding="utf-8")
    return tmp_path


def test_texts_are_reviews_one_behind_the_other(data, tmp_path):
    folder = tmp_path / "joined"
    folder.mkdir()
    long_text.write_texts(data, folder, words=20)
    with (folder / "ids-cfimdb-train.csv").open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened, delimiter="\t"))
    assert [row["sentence"].split()[4] for row in rows] == [f"{i}" for i in range(0, 24, 3)]
    assert all(len(row["sentence"].split()) == 20 for row in rows)
    assert {row["sentiment"] for row in rows} == {"0", "1"}


def test_too_few_reviews_and_no_file(data, tmp_path):
    with pytest.raises(InputError, match=r"ids-cfimdb-train\.csv: expected more reviews"):
        long_text.write_texts(data, tmp_path, words=2000)
    with pytest.raises(InputError, match=r"ids-cfimdb-train\.csv: No such file"):
        long_text.write_texts(tmp_path / "nowhere", tmp_path, words=10)


@pytest.mark.parametrize("text", ["512", "0x512", "9x512", "1x8193", "1x15", "1 x 512", "-1x512"])
def test_cases_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        long_text._case(text)


def test_every_step_and_precision(data, tmp_path, monkeypatch):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    shape = {"model_type": "modernbert", **sizes, "intermediate_size": 48}
    monkeypatch.setitem(random_encoder.SHAPES, "modernbert-small", shape)
    monkeypatch.setitem(random_encoder.LEAST_VOCABULARY, "modernbert", 64)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "film", "is", "number"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    path = tmp_path / "record.json"
    given = ["--device", "cpu", "--rounds", "2", "--json", str(path), "--cases", "2x140", "1x32"]
    folders = ["--data", str(data), "--init", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench.long_text", *given, *folders])
    long_text.main()
    results = json.loads(path.read_text())["results"]
    assert results["failures"] == {}
    cases = [Case(measured["texts"], measured["tokens"]) for measured in results["cases"]]
    assert list(dict.fromkeys(cases)) == [Case(2, 140), Case(1, 32)]
    for measured in results["cases"]:
        assert measured["seconds"].keys() == {"this engine", "transformers", "accelerated"}
        assert measured["peak_bytes"].keys() == measured["seconds"].keys()
