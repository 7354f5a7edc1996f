"""A new kind of head is one file: what docs/extending.md shows is run as it stands there."""

import csv
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from engine import evaluate, export, predict, report, train
from engine.data.source import FURTHER_KINDS, TaskSource
from engine.models import heads
from engine.models.heads import HEADS, METRICS, Head, register
from engine.models.pooling import at_least_fp32
from engine.runs.run import open_run
from engine.utils.errors import InputError

from ....conftest import REPOSITORY
from ...conftest import TINY

PAGE = REPOSITORY / "docs" / "extending.md"
SECTION = PAGE.read_text(encoding="utf-8").partition("## Add a head\n")[2].partition("\n## ")[0]
FILE, REGISTRY_LINE, TEST = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
(RECIPE,) = re.findall(r"```toml\n(.*?)```", SECTION, re.DOTALL)

SETTINGS = [*TINY, "max_train_examples=0", "epochs=8", "lr=1e-2"]
WORDS = ("awful", "poor", "fair", "good", "superb")  # none to four stars


def run_as(code: str, name: str) -> ModuleType:
    """Run code as the module of that name."""
    module = ModuleType(name)
    module.__package__ = name.rpartition(".")[0]
    exec(compile(code, name, "exec"), vars(module))
    return module


@pytest.fixture
def no_other_kinds() -> Iterator[None]:
    """Take out of the registry again what the test put there."""
    before = dict(HEADS), set(FURTHER_KINDS)
    yield
    for registry, kept in zip((HEADS, FURTHER_KINDS), before, strict=True):
        registry.clear()
        registry.update(kept)


@pytest.fixture
def ordinal(no_other_kinds: None) -> type[Head]:
    """The head of the page, registered as the page says."""
    head: type[Head] = run_as(FILE, "engine.models.heads.ordinal").OrdinalHead
    exec(REGISTRY_LINE, {"register": register, "OrdinalHead": head})
    return head


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A data folder with the file and the recipe of the page."""
    rows = [
        (f"a {word} film , number {n}", stars) for n in range(8) for stars, word in enumerate(WORDS)
    ]
    with (tmp_path / "stars.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("review", "stars"), *rows])
    (tmp_path / "stars.toml").write_text(RECIPE)
    return tmp_path


def done(folder: Path, recipe: str = "stars.toml", *settings: str) -> Path:
    """Train, evaluate, predict, report and export; return the run's folder."""
    run, data = folder / "run", ["--data", str(folder)]
    arguments = [str(folder / recipe), *data, "--out", str(run)]
    assert train.main([*arguments, "--set", *SETTINGS, *settings]) == 0
    assert evaluate.main([str(run), *data]) == 0
    rows = ["--input", str(folder / "stars.csv"), "--output", str(folder / "found.tsv")]
    assert predict.main([str(run), "--task", "stars", *rows]) == 0
    assert report.main([str(run), *data, "--out", str(folder / "report")]) == 0
    assert export.main([str(run), "--to", str(folder / "model")]) == 0
    return run


def test_the_page_is_followed_from_training_to_the_export(ordinal, reviews, monkeypatch, capsys):
    run = done(reviews)
    score = json.loads((run / "metrics.json").read_text())["scores"]["stars"]
    cells = [line.split("\t")[1] for line in (reviews / "found.tsv").read_text().splitlines()[1:]]
    found = np.array(cells, dtype=float)
    assert score == pytest.approx(np.mean(abs(found - np.tile(range(5), 8)) <= 1))
    assert score > 0.8  # it has learnt something
    (page,) = (reviews / "report").glob("*.html")
    assert "stars: within_one" in page.read_text()

    card = (reviews / "model" / "README.md").read_text()
    assert "| stars | within_one |" in card
    assert ordinal.answers_text in " ".join(card.split())
    (example,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (reviews / "example.py").write_text(example)
    for row in (0, 4, 7):
        text = f"a {WORDS[row % 5]} film , number {row // 5}"
        monkeypatch.setattr(sys, "argv", ["", str(reviews / "model"), "stars", text])
        capsys.readouterr()
        runpy.run_path(str(reviews / "example.py"))
        assert float(capsys.readouterr().out) == found[row]


def test_the_test_of_the_page_passes(ordinal):
    tests = run_as(TEST, "tests.engine.models.heads.test_ordinal")
    names = [name for name in vars(tests) if name.startswith("test_")]
    assert len(names) == 2
    for name in names:
        getattr(tests, name)()
    assert ordinal is HEADS["ordinal"]


class BrightestToken(Head):
    """Reads the tokens, has weights without an output layer, and answers any number."""

    known_features = ("single",)
    metrics = (METRICS["pearson"],)
    answers = "brightest"
    reads_tokens = True

    def __init__(self, settings):
        super().__init__(settings)
        self.direction = torch.nn.Parameter(torch.randn(settings.config.hidden_size) / 8)

    def forward(self, states):
        brightness = at_least_fp32(states.tokens @ self.direction)
        bounds = states.cu_seqlens.long()
        return torch.segment_reduce(brightness, "max", offsets=bounds, initial=-1e9)

    def loss(self, scores, labels):
        return F.mse_loss(scores, self.given(labels, scores))

    def predict(self, scores):
        return scores


def test_a_head_of_tokens_and_of_any_number(no_other_kinds, reviews):
    register("brightest", BrightestToken)
    recipe = RECIPE.replace("ordinal", "brightest").replace("classes = 5", "range = [0.0, 4.5]")
    (reviews / "other.toml").write_text(recipe)
    rows = (reviews / "stars.csv").read_text()
    (reviews / "stars.csv").write_text(re.sub(",(\\d)\r?\n", r",\1.25\n", rows))
    folder = done(reviews, "other.toml", "phases.head.freeze_encoder=true", "phases.all.epochs=2")
    run = open_run(folder)
    form = run.recipe.formats["stars"]
    assert (form.kind, form.low, form.high, form.whole) == ("brightest", 0, 4.5, False)
    lines = (reviews / "found.tsv").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"\d+\t-?\d+\.\d{4}", line) for line in lines)
    with safe_open(reviews / "model" / "heads.safetensors", "pt") as file:
        assert list(file.keys()) == ["stars.direction"]
        assert json.loads(file.metadata()["stars"])["answers"] == "brightest"


@pytest.mark.parametrize(
    ("line", "instead", "expected"),
    [
        ("classes = 5", "range = [0, 4]", "source.classes: ordinal needs at least two, by name"),
        ("classes = 5", "classes = []", "source.classes: ordinal needs at least two, by name"),
        ('["review"]', '["review", "stars"]', "text: 2 given, which no head for ordinal reads"),
        ('head = "single"', 'head = "cosine"', "head = 'cosine': expected single or bilstm"),
        ('head = "single"', 'head = "single"\nloss = "mse"', "a head for ordinal is trained by"),
    ],
)
def test_what_does_not_fit_the_kind_is_one_line(ordinal, reviews, line, instead, expected):
    (reviews / "stars.toml").write_text(RECIPE.replace(line, instead))
    with pytest.raises(InputError, match=re.escape(expected)):
        done(reviews)


def test_a_kind_is_registered_once_and_named_only_then(ordinal):
    with pytest.raises(ValueError, match="'ordinal': registered already, as OrdinalHead"):
        register("ordinal", ordinal)
    with pytest.raises(
        ValueError, match="expected one of classes, binary, multi_label, score, tags"
    ):
        heads.head_class("unheard-of")
    files = {"train": "a.csv"}
    assert TaskSource(kind="ordinal", text=("a",), classes=3, files=files).format("t").whole
    with pytest.raises(ValueError, match="'classification', 'regression'"):
        TaskSource(kind="unheard-of", text=("a",), classes=3, files=files)
