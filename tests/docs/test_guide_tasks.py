"""The guide's five tasks, trained by the commands that it gives."""

import json
import re
import shlex
from pathlib import Path

import pytest

from engine import evaluate, predict, train
from examples import five_tasks

GUIDE = five_tasks.GUIDE.read_text(encoding="utf-8")
PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}
SMALL = ["--set", "encoder.hidden_size=32", "encoder.num_hidden_layers=1", "max_train_examples=64"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of somebody who follows the guide."""
    five_tasks.main([str(tmp_path / "five")])
    monkeypatch.chdir(tmp_path / "five")
    return tmp_path / "five"


def test_the_guide_can_be_followed(folder: Path) -> None:
    commands = re.findall(r"^    python -m engine\.(\w+) (.*)$", GUIDE, re.MULTILINE)
    assert [program for program, _ in commands] == ["train", "evaluate", "predict"]
    for program, arguments in commands:
        small = SMALL if program == "train" else []
        assert PROGRAMS[program]([*shlex.split(arguments), *small]) == 0

    tasks = {"reviews", "stars", "duplicates", "similarity", "topics"}
    scores = json.loads((folder / "run" / "metrics.json").read_text())["scores"]
    assert scores.keys() == tasks | {"overall"}
    header, *rows = (folder / "verdicts.tsv").read_text().splitlines()
    assert header == "id\tprediction"
    assert [row.split("\t")[0] for row in rows] == [str(number) for number in range(len(rows))]
    assert {row.split("\t")[1] for row in rows} <= {"bad", "fair", "good"}


def test_the_heads_of_the_files_are_as_shown(folder: Path) -> None:
    corpus = folder / "corpus"
    assert (corpus / "reviews-train.csv").read_text().splitlines()[0] in GUIDE
    shown = re.search(r'^    (\{"first".*\})$', GUIDE, re.MULTILINE)
    first = json.loads((corpus / "duplicates-train.jsonl").read_text().splitlines()[0])
    assert json.loads(shown[1]).keys() == first.keys()
