"""The guide's five tasks, trained by the commands that it gives."""

import io
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from engine import evaluate, export, predict, report, train
from engine.config import recipe as recipes
from engine.data.demo import write_demo
from engine.data.table import read_table
from engine.predict import Predictor
from examples import five_tasks

from .pages import Page

PAGE = Page("guide-tasks")
GUIDE = PAGE.text
PROGRAMS = {"train": train.main, "evaluate": evaluate.main, "predict": predict.main}
SMALL = ["--set", "encoder.hidden_size=32", "encoder.num_hidden_layers=1", "max_train_examples=64"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of somebody who follows the guide."""
    five_tasks.main([str(tmp_path / "five")])
    monkeypatch.chdir(tmp_path / "five")
    return tmp_path / "five"


def test_the_guide_can_be_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = re.findall(r"^    python -m engine\.(\w+) (.*)$", GUIDE, re.MULTILINE)
    commands = [command for command in commands if "--passages" not in command[1]]
    programs = [program for program, _ in commands]
    assert programs == ["train", "evaluate", "evaluate", "predict"]
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

    piped = re.search(r"^    printf '(.*)' \| python -m engine\.predict (.*)$", GUIDE, re.MULTILINE)
    text = io.BytesIO(piped[1].replace("\\n", "\n").encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text))
    capsys.readouterr()
    assert predict.main(shlex.split(piped[2])) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    *_, block = PAGE.blocks("python", "Train, score, predict")
    exec(block)
    answers = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[1] for line in lines] == [line.split()[0] for line in answers]


@pytest.mark.parametrize("at", [".", "five", "elsewhere"])
def test_all_data_are_found_from_any_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The data set by name, too, without a setting that names its folder."""
    above = folder.parent
    (above / "elsewhere").mkdir()
    monkeypatch.chdir(above / at)
    recipe = [str(folder / "five.toml"), "--data", str(folder / "corpus")]
    if at != "elsewhere":
        recipe = [os.path.relpath(path) if "/" in path else path for path in recipe]
    assert train.main([*recipe, "--out", "run", "--max-steps", "1", *SMALL]) == 0
    monkeypatch.chdir(above)
    assert evaluate.main([f"{at}/run"]) == 0


def test_the_source_of_a_stream(tmp_path: Path) -> None:
    """The recipe of the section, with the head and the steps that it needs besides."""
    *_, block = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    (tmp_path / "topics.toml").write_text(
        f'train = ["topics"]\nmax_steps = 9\n[tasks.topics]\nhead = "single"\n{block}'
    )
    assert recipes.load(str(tmp_path / "topics.toml")).streamed == ("topics",)


def test_tags_and_several_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second recipe, on the files that it names, through every command."""
    _, recipe, *_ = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    corpus, run = tmp_path / "demo", tmp_path / "run"
    write_demo(corpus)
    shown = re.findall(r"^    (\w+ [BIO]\S*)$", GUIDE, re.MULTILINE)
    assert shown == (corpus / "slots-train.conll").read_text().splitlines()[1:4]
    (begun,) = re.findall(r'^    (\{"id".*)$', GUIDE, re.MULTILINE)
    assert (corpus / "aspects-train.jsonl").read_text().splitlines()[1].startswith(begun)

    (tmp_path / "kinds.toml").write_text(recipe)
    paths = ["--data", str(corpus), "--out", str(run)]
    small = [*SMALL, "max_train_examples=1600", "encoder.hidden_size=48"]
    assert train.main([str(tmp_path / "kinds.toml"), *paths, *small]) == 0
    names = ["entities", "entities.accuracy"]
    names += ["topics", "topics.f1_macro", "topics.average_precision", "overall"]
    scores = json.loads((run / "metrics.json").read_text())["scores"]
    assert [*scores] == names
    assert scores["overall"] == pytest.approx((scores["entities"] + scores["topics"]) / 2)
    assert scores["entities.accuracy"] > 0.7  # it has learnt something
    assert evaluate.main([str(run)]) == 0
    assert json.loads((run / "metrics.json").read_text())["scores"] == scores

    for task, file in (("entities", "slots-dev.conll"), ("topics", "aspects-dev.jsonl")):
        output = ["--input", str(corpus / file), "--output", str(run / f"{task}.tsv")]
        assert predict.main([str(run), "--task", task, *output]) == 0
    form = recipes.load(str(run / "recipe.toml")).formats["entities"]
    table = read_table(corpus / "slots-dev.conll", form)
    _, *rows = (run / "entities.tsv").read_text().splitlines()
    tags = [row.split("\t")[1].split() for row in rows]
    assert list(map(len, tags)) == list(map(len, table.words))
    numbers = [form.classes.index(tag) for text in tags for tag in text]
    accuracy = np.mean(np.array(numbers) == table.labels)
    assert accuracy == pytest.approx(scores["entities.accuracy"])

    assert report.main([str(run), "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "run.html").read_text()
    assert "entity_f1 of" in page
    assert export.main([str(run), "--to", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| topics | average_precision |" in card
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "example.py").write_text(example)
    with (corpus / "aspects-dev.jsonl").open() as file:
        review = json.loads(next(file))["review"]
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "model"), "topics", review])
    capsys.readouterr()
    runpy.run_path(str(tmp_path / "example.py"))
    answer = capsys.readouterr().out.split()
    first = (run / "topics.tsv").read_text().splitlines()[1].split("\t")[1]
    assert ",".join(answer) == first.replace("[]", "")


def test_retrieval(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third recipe, and passages that are found as the guide finds them."""
    recipe = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)[2]
    write_demo(tmp_path / "demo")
    (tmp_path / "replies.toml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "max_train_examples=1200", "encoder.hidden_size=48"]
    assert train.main(["replies.toml", "--data", "demo", "--out", "run", *small]) == 0
    scores = json.loads(Path("run/metrics.json").read_text())["scores"]
    names = ["replies", *(f"replies.{name}" for name in ("mrr@10", "recall@1", "recall@10"))]
    assert [*scores] == [*names, "overall"]
    assert scores["replies"] > 0.5  # of 500 passages: by chance 0.01

    form = recipes.load("run/recipe.toml").formats["replies"]
    questions, passages = read_table(Path("demo/replies-dev.jsonl"), form).sentences
    Path("questions.txt").write_text("\n".join(questions[:9]))
    Path("replies.txt").write_text("\n".join(passages))
    (line,) = re.findall(r"^    python -m engine\.predict (run .*--passages.*)$", GUIDE, re.M)
    capsys.readouterr()
    assert predict.main(shlex.split(line)) == 0
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert "    " + "      ".join(header[:2]) in GUIDE
    assert [row[:2] for row in rows] == [[str(q), str(k)] for q in range(9) for k in (1, 2, 3)]
    (block,) = PAGE.blocks("python", "Retrieval")
    exec(block, {"passages": passages})
    assert len(capsys.readouterr().out.splitlines()) == 3

    assert report.main(["run", "--out", "pages"]) == 0
    assert "ndcg@10 0." in Path("pages/run.html").read_text()
    assert export.main(["run", "--to", "model"]) == 0
    (example,) = re.findall(r"```python\n(.*?)```", Path("model/README.md").read_text(), re.DOTALL)
    Path("example.py").write_text(example)
    pair = ["the sea", "some dogs hide boats in the street ."]
    monkeypatch.setattr(sys, "argv", ["", "model", "replies", *pair])
    capsys.readouterr()
    runpy.run_path("example.py")
    (answer,) = Predictor("run", precision="fp32")("replies", [tuple(pair)])
    assert float(capsys.readouterr().out) == pytest.approx(answer.prediction, abs=1e-5)


def test_answers_within_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fourth recipe, with windows: the sequences are shorter than the contexts."""
    recipe = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)[3]
    write_demo(tmp_path / "demo")
    (tmp_path / "spans.toml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    small = [*SMALL, "max_length=20", "max_train_examples=600", "epochs=2"]
    assert train.main(["spans.toml", "--data", "demo", "--out", "run", *small]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"spans-dev.json as \d+ windows of 500 questions' contexts", printed)
    scores = json.loads(Path("run/metrics.json").read_text())["scores"]
    assert [*scores] == ["answers", "answers.exact_match", "overall"]
    assert evaluate.main(["run"]) == 0
    assert json.loads(Path("run/metrics.json").read_text())["scores"] == scores

    rows = ["--task", "answers", "--input", "demo/spans-dev.json"]
    for name in ("out.jsonl", "out.tsv"):
        assert predict.main(["run", *rows, "--output", name]) == 0
    form = recipes.load("run/recipe.toml").formats["answers"]
    table = read_table(Path("demo/spans-dev.json"), form)
    found = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [each["id"] for each in found] == table.ids
    texts = [each["prediction"] for each in found]
    for each, context in zip(found, table.sentences[1], strict=True):
        start = each.get("answer_start", 0)
        assert context[start : start + len(each["prediction"])] == each["prediction"]
        assert ("answer_start" in each) == bool(each["prediction"])
    _, *cells = Path("out.tsv").read_text().splitlines()
    assert [cell.split("\t")[1] for cell in cells] == texts
    known = [
        {context[slice(*span)] for span in spans} or {""}
        for context, spans in zip(table.sentences[1], table.answers, strict=True)
    ]
    right = np.mean([text in own for text, own in zip(texts, known, strict=True)])
    assert right == pytest.approx(scores["answers.exact_match"])
    capsys.readouterr()
    (block,) = PAGE.blocks("python", "Answers within a text")
    exec(block)
    assert len(capsys.readouterr().out.splitlines()) == 1

    assert report.main(["run", "--out", "pages"]) == 0
    assert "squad_f1 0." in Path("pages/run.html").read_text()
    assert export.main(["run", "--to", "model"]) == 0
    card = Path("model/README.md").read_text()
    assert "question and context -> spans of context, or none" in card


def test_the_heads_of_the_files_are_as_shown(folder: Path) -> None:
    corpus = folder / "corpus"
    assert (corpus / "reviews-train.csv").read_text().splitlines()[0] in GUIDE
    shown = re.search(r'^    (\{"first".*\})$', GUIDE, re.MULTILINE)
    first = json.loads((corpus / "duplicates-train.jsonl").read_text().splitlines()[0])
    assert json.loads(shown[1]).keys() == first.keys()
