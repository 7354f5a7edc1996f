"""A task whose source is a file of CS224N, tabs under ``.csv``: found out, and said once."""

import gzip
from pathlib import Path

import pytest

from engine import evaluate, predict
from engine.config.recipe import load
from engine.runs.data_paths import data_folder
from engine.train import main

from ..conftest import TINY

RECIPE = """
train = ["films"]
[tasks.films]
head = "single"
[tasks.films.source]
kind = "classification"
text = ["sentence"]
label = "sentiment"
id = "id"
classes = 5
files = { train = "ids-sst-train.csv", dev = "ids-sst-dev.csv", test = "ids-sst-dev.csv" }
[phases.one]
lr = 1e-3
[phases.two]
lr = 1e-4
"""
NOTE = "read ids-sst-{}.csv as separated by tabs, as its header is, not by commas"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films.toml").write_text(RECIPE)
    return "films.toml"


def test_what_was_found_out_is_printed_once_for_each_file(recipe, tmp_path, capsys):
    data = data_folder(load("demo"))
    arguments = [recipe, "--data", str(data), "--out", "run", "--max-steps", "1"]
    for more in (["--dry-run"], []):  # the second reads from the cache
        assert main([*arguments, *more, "--set", *TINY]) == 0
        shown = capsys.readouterr().out
        for split in ("train", "dev"):
            assert shown.count(f"films: {NOTE.format(split)}\n") == 1

    assert evaluate.main(["run"]) == 0
    shown = capsys.readouterr().out
    assert NOTE.format("dev") in shown
    assert NOTE.format("train") not in shown
    assert evaluate.main(["run", "--split", "test"]) == 0  # its test file has labels
    assert capsys.readouterr().out == shown.replace("dev scores", "test scores")

    rows = (data / "ids-sst-dev.csv").read_text(encoding="utf-8")
    for name, content in {
        "as-it-is.csv": rows.encode(),
        "in-utf-16.csv.gz": gzip.compress(rows.encode("utf-16")),
    }.items():
        (tmp_path / name).write_bytes(content)
        output = f"{name}.out"
        options = ["--task", "films", "--input", name, "--output", output]
        assert predict.main(["run", *options]) == 0
        shown = capsys.readouterr().out
        assert shown.count(f"read {name} as separated by tabs") == 1
        assert shown.count(f"read {name} as UTF-16-LE") == ("16" in name)
    predictions = [path.read_text() for path in sorted(tmp_path.glob("*.out"))]
    assert predictions[0] == predictions[1]


def test_a_delimiter_that_is_set_is_not_said(recipe, capsys):
    data = data_folder(load("demo"))
    options = ["--data", str(data), "--out", "run", "--max-steps", "1"]
    settings = ["--set", *TINY, "tasks.films.source.delimiter=tab"]
    assert main([recipe, *options, *settings]) == 0
    assert "separated" not in capsys.readouterr().out
    assert load("run/recipe.toml").tasks["films"].source.delimiter == "\t"
