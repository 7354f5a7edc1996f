"""The guide to files as they are found: its commands on files laid out as GLUE's."""

import csv
import re
import shlex
import tomllib
from pathlib import Path

from engine import evaluate, glue, predict, train
from engine.config import recipe as recipes

from ..engine.data.glue import write_glue

GUIDE = (Path(__file__).parents[2] / "docs" / "guide-files.md").read_text(encoding="utf-8")
PROGRAMS = {"train": train, "evaluate": evaluate, "predict": predict, "glue": glue}
SMALL = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256"),
]


def test_the_guide_can_be_followed(tmp_path: Path, monkeypatch, capsys) -> None:
    write_glue(tmp_path / "glue")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python -m engine\.(\w+) (.*)$", GUIDE, re.MULTILINE)
    assert [program for program, _ in commands] == [
        *("train", "evaluate", "evaluate", "predict", "glue")
    ]
    for program, line in commands:
        arguments = shlex.split(line.replace(" --init MODEL", ""))
        small = ["--set", *SMALL] if program == "train" else []
        assert PROGRAMS[program].main([*arguments, *small]) == 0

    shown = capsys.readouterr().out
    # Of training and its dev set, and of the dev set once more.
    assert shown.count("qqp: 1 rows skipped (number of fields)") == 3
    with Path("grades.tsv").open(encoding="utf-8") as file:
        written = list(csv.reader(file, delimiter="\t"))
    assert written[0] == ["id", "prediction"]
    assert len(written) == 4
    assert all(prediction for _, prediction in written[1:])
    assert len([*Path("submission").iterdir()]) == 11


def test_what_the_guide_shows_of_the_recipe() -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    recipe = tomllib.loads((recipes.RECIPES / "glue.toml").read_text(encoding="utf-8"))
    assert tomllib.loads(shown)["tasks"]["cola"] == recipe["tasks"]["cola"]
    tasks = dict(re.findall(r"^\| `(\w+)` \| `([\w-]+)` \|", GUIDE, re.MULTILINE))
    assert list(tasks) == recipe["train"]
    for task, folder in tasks.items():
        files = recipe["tasks"][task]["source"]["files"]
        assert files["train"] == f"{folder}/train.tsv"
