"""The page on long texts: its commands and code, on reviews of 700 words."""

import csv
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from engine import train
from engine.models.bert import BertConfig
from engine.models.modernbert import ModernBertConfig
from engine.predict import Predictor
from engine.runs.run import open_run

from ..conftest import REPOSITORY
from ..engine.models.encoder_cases import EncoderCase, write_folder
from .pages import Page

PAGE = Page("long-texts")
SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
RECIPE = """
description = "long reviews"
train = ["reviews"]
batch_size = 20
max_steps = 2
[tasks.reviews]
head = "single"
[tasks.reviews.source]
kind = "classification"
text = ["review"]
label = "verdict"
classes = ["bad", "good"]
files = { train = "train.csv", dev = "dev.csv" }
"""


ENDS = {"good": "fine", "bad": "saw"}  # words that the vocabulary of the model has


def review(number: int, verdict: str) -> str:
    """A text of 700 words, whose end alone says what it is."""
    words = ["film", "was", "fine", "saw", "times", str(number), "the", "it"]
    return " ".join([words[place % 8] for place in range(690)] + [ENDS[verdict]] * 10)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with what the page names: models, DIR, the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("long"))
        bert = BertConfig(vocab_size=97, num_hidden_layers=1, max_position_embeddings=512, **SHAPE)
        modern = ModernBertConfig(
            vocab_size=97, num_hidden_layers=3, max_position_embeddings=1024, **SHAPE
        )
        for name, config in (("MODEL", bert), ("MODERNBERT", modern)):
            write_folder(EncoderCase(config=config, stages=(), tables=()), Path(name))
        Path("DIR").mkdir()
        Path("reviews.toml").write_text(RECIPE)
        for file, count in (("train", 40), ("dev", 4)):
            with Path(f"DIR/{file}.csv").open("w", newline="") as opened:
                writer = csv.writer(opened)
                writer.writerow(["review", "verdict"])
                for number in range(count):
                    verdict = ("bad", "good")[number % 2]
                    writer.writerow([review(number, verdict), verdict])
        yield


def test_the_end_is_cut_and_the_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["reviews.toml", "--data", "DIR", "--init", "MODEL", "--out", "runs/cut"]
    assert train.main(arguments) == 0
    (line,) = re.findall(r"^    (reviews: .*)$", PAGE.text, re.MULTILINE)
    assert line in capsys.readouterr().out
    assert open_run(Path("runs/cut")).max_length == 512
    predictor = Predictor("runs/cut")
    good, bad = predictor("reviews", [review(1, "good"), review(1, "bad")])
    assert good.probabilities == bad.probabilities  # nothing of the end is seen


def test_modernbert(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = PAGE.commands("ModernBERT")
    assert train.main(shlex.split(command)[3:]) == 0
    assert "cut to the length limit" not in capsys.readouterr().out
    assert open_run(Path("runs/long")).max_length == 1024  # of this small one
    predictor = Predictor("runs/long")
    good, bad = predictor("reviews", [review(1, "good"), review(1, "bad")])
    assert good.probabilities != bad.probabilities


def test_parts_and_their_mean(capsys: pytest.CaptureFixture[str]) -> None:
    cut, average, shorten = PAGE.blocks("python")
    scope: dict[str, Any] = {"texts": [review(1, "good"), review(1, "bad"), "a film"]}
    exec(cut, scope)
    (command,) = PAGE.commands("Parts of a text")
    assert train.main(shlex.split(command)[3:]) == 0
    printed = capsys.readouterr().out
    assert "reviews: 4 sentences cut to the length limit" in printed  # those of dev alone
    assert "reviews: 40 sentences" not in printed
    exec(average, scope)
    assert len(capsys.readouterr().out.splitlines()) == 3

    parts: Callable[..., list[str]] = scope["parts"]
    good, bad, short = scope["classify"](scope["texts"])
    assert good != bad  # the end is seen
    assert parts("a film") == ["a film"]
    (alone,) = Predictor("runs/parts")("reviews", ["a film"])
    assert short == pytest.approx(alone.probabilities)
    own = Predictor("runs/parts")("reviews", parts(scope["texts"][0]))
    mean = sum(answer.probabilities["good"] for answer in own) / len(own)
    assert good["good"] == pytest.approx(mean)

    tokenizer = scope["tokenizer"]
    for text in scope["texts"]:
        made = parts(text, size=50, overlap=10)
        whole = tokenizer.encode(text, add_special_tokens=False).tokens
        sizes = [len(tokenizer.encode(part, add_special_tokens=False)) for part in made]
        assert max(sizes) <= 80
        assert made[0] == text[: len(made[0])]
        assert made[-1] == text[-len(made[-1]) :]
        assert sum(sizes) >= len(whole)
    assert parts(" ".join(["film"] * 50), size=50, overlap=10) == [" ".join(["film"] * 50)]
    assert len(parts(" ".join(["film"] * 51), size=50, overlap=10)) == 2

    exec(shorten, scope)
    shortened = scope["head_and_tail"](scope["texts"][0], head=20, tail=30)
    assert scope["texts"][0].startswith(shortened[:20])
    assert shortened.endswith("fine")
    assert len(tokenizer.encode(shortened, add_special_tokens=False)) <= 55
    assert scope["head_and_tail"]("a film") == "a film"


def test_the_figures_are_those_of_the_record() -> None:
    record = json.loads((REPOSITORY / "bench/results/cpu-bf16/long_text.json").read_text())
    shown = re.findall(r"^\| (\d) x ([\d,]+) \| ([\d.]+) \| (\d+) \|$", PAGE.text, re.MULTILINE)
    cases = {
        case["case"]: (case["seconds"]["this engine"], case["peak_bytes"]["this engine"])
        for case in record["results"]["cases"]
        if case["precision"] == "bf16"
    }
    assert len(shown) == len(cases) == 4
    for texts, tokens, seconds, mebibytes in shown:
        measured, peak = cases[f"{texts} x {tokens.replace(',', '')}"]
        assert seconds == f"{median(measured):.2f}"
        assert mebibytes == f"{peak / (1 << 20):.0f}"
