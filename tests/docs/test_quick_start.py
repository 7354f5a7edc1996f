"""The quick start's commands, on a smaller model, print what the page shows but for the figures."""

import io
import re
import shlex
import sys
from pathlib import Path

import pytest

from engine import evaluate, export, predict, report, train
from tests.conftest import REPOSITORY
from tests.docs.pages import Page

PAGE = Page("quick-start")
PROGRAMS = {
    "evaluate": evaluate.main,
    "predict": predict.main,
    "report": report.main,
    "export": export.main,
}
SMALL = ["--set", "encoder.hidden_size=32", "encoder.num_hidden_layers=1", "max_train_examples=320"]


def shape(text: str) -> list[str]:
    """Lines without figures and what depends on them, without those that the page leaves out."""
    text = re.sub(r"  \(best so far\)|\((?:bfloat16|float32)\)", "", text)
    lines = re.sub(r"\d+(?:\.\d+)?", "N", text).splitlines()
    return [line.rstrip() for line in lines if not re.match("epoch|…|━+ N/N|$", line)]


def run(command: str) -> None:
    _, _, program, *arguments = shlex.split(command)
    assert PROGRAMS[program.removeprefix("engine.")](arguments) == 0


def test_the_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (made,) = re.findall(
        r"python -m engine\.(train demo)$", (REPOSITORY / "Makefile").read_text(), re.M
    )
    monkeypatch.chdir(tmp_path)
    assert train.main([*made.split()[1:], *SMALL]) == 0
    trained, scored, predicted, exported = PAGE.blocks("text")
    printed = capsys.readouterr().out
    assert shape(printed) == shape(trained)
    assert re.search(r"^epoch 1  dev  sst \S+  quora \S+  sts \S+  overall ", printed, re.M)

    score, look, take = PAGE.commands()
    run(score)
    assert shape(capsys.readouterr().out) == shape(scored)
    ((text, piped),) = re.findall(r"^    printf '(.*)' \| (python .*)$", PAGE.text, re.M)
    typed = io.BytesIO(text.replace("\\n", "\n").encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed))
    run(piped)
    lines = capsys.readouterr().out
    assert shape(lines) == shape(predicted)
    PAGE.run_python()
    answers = capsys.readouterr().out.splitlines()
    assert [answer.split()[0] for answer in answers] == re.findall(r"\t(\d)", lines)
    run(look)
    assert "conflict" in Path("pages/demo-1.html").read_text()
    capsys.readouterr()
    run(take)
    assert capsys.readouterr().out == exported
    assert Path("exported/README.md").is_file()
