"""The first own data, by the commands of the page, in the folder of the files."""

import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from engine import evaluate, predict, train
from tests.docs.pages import Page

PAGE = Page("first-data")
PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}


def run(command: str) -> None:
    _, _, program, *arguments = shlex.split(command)
    assert PROGRAMS[program.removeprefix("engine.")](arguments) == 0


def test_one_task_and_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reviews, stars = PAGE.blocks("csv")
    recipe, more = PAGE.blocks("toml")
    scores, answers = PAGE.blocks("text")
    Path("reviews.csv").write_text(reviews)
    Path("reviews.toml").write_text(recipe)
    assert len(reviews.splitlines()) == 1 + 8
    assert len(recipe.splitlines()) <= 15

    first, second = PAGE.commands("One task")
    run(first)
    printed = capsys.readouterr().out
    assert re.sub(r"step \d+|\d\.\d+", "N", printed).endswith(
        re.sub(r"step \d+|\d\.\d+", "N", scores)
    )
    run(second)
    assert "reviews" in capsys.readouterr().out
    ((text, piped),) = re.findall(r"^    printf '(.*)' \| (python .*)$", PAGE.text, re.M)
    typed = io.BytesIO(text.replace("\\n", "\n").encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed))
    run(piped)
    assert capsys.readouterr().out == answers

    (line,) = re.findall(r'`(train = \["reviews", .*?)`', PAGE.text)
    Path("reviews.toml").write_text(recipe.replace(recipe.splitlines()[0], line) + more)
    Path("stars.csv").write_text(stars)
    for command in PAGE.commands("A second task"):
        run(command)
    assert json.loads(Path("run-of-two/metrics.json").read_text())["scores"].keys() == {
        "reviews",
        "stars",
        "overall",
    }
    header, *rows = Path("stars.tsv").read_text().splitlines()
    assert header == answers.splitlines()[0]
    assert len(rows) == len(stars.splitlines()) - 1
    assert all(1 <= float(row.split("\t")[1]) <= 5 for row in rows)
