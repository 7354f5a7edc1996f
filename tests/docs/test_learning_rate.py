"""The page's rates are the recipes', its settings exist, and its small run does what it says."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import report, train
from engine.cli.options import overrides, parser
from engine.config import recipe as recipes

from ..conftest import REPOSITORY
from .pages import Page

PAGE = Page("learning-rate")
SMALL = ["encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"]
SMALL += ["max_train_examples=96", "threads=1", "batch_size=8"]


def test_the_recipes_have_the_rates_of_the_table() -> None:
    rows = re.findall(
        r"^\| (\S+) \| (.*?) \| .* \|$", PAGE.section("Where 1e-5, 1.5e-4 and 1e-3 come from"), re.M
    )
    found = {}
    for rate, names in rows[1:] if rows[0][0] == "`lr`" else rows:
        for name in re.findall(r"`([a-z0-9-]+)`", names):
            found.setdefault(name, set()).add(rate)
    assert len(found) > 12
    for name, rates in found.items():
        recipe = recipes.load(name)
        of_phases = {phase.lr for phase in recipe.in_phases.values()} | {recipe.lr}
        assert {float(rate) for rate in rates if re.match(r"\d", rate)} <= of_phases, name
    assert recipes.load("cgs").lr == type(recipes.load("cgs")).model_fields["lr"].default == 1e-5


def test_the_commands_are_ones_that_are_taken() -> None:
    for line in PAGE.commands():
        words = shlex.split(line)[2:]
        if words[0] == "engine.train":
            options = parser().parse_args(words[1:])
            recipes.load(options.recipe, overrides(options))


def test_each_setting_of_the_page_exists(tmp_path: Path) -> None:
    prose = re.sub(r"^    .*$", "", PAGE.text, flags=re.MULTILINE)
    shown = re.findall(r"\b([a-z_]+)=([\w.-]+)", prose)
    assert len(shown) > 12
    for key, value in shown:
        recipes.load("best", [f"{key}={value}"])
    schedules = re.findall(r"`schedule` is (.*?)\.", PAGE.text, re.DOTALL)[0]
    for schedule in re.findall(r"`(\w+)`", schedules):
        recipes.load("best", [f"schedule={schedule}"])
    (block,) = PAGE.blocks("toml")
    (tmp_path / "mine.toml").write_text(block)
    recipe = recipes.load(str(tmp_path / "mine.toml"))
    assert recipe.batch_sizes((6000, 60_000, 6000)) == [16, 32, 16]


@pytest.mark.parametrize(
    ("file", "recipe", "row"),
    [
        ("three_tasks", "three_tasks", "three tasks, MiniLM-L6"),
        ("five_tasks", "five_tasks", "five tasks, from scratch"),
        ("demo", "demo", "`demo`, from scratch"),
    ],
)
def test_scores_by_rate_are_the_records(file: str, recipe: str, row: str) -> None:
    record = json.loads((REPOSITORY / f"bench/results/balancing/{file}.json").read_text())
    scores = {
        float(run["point"][1].removeprefix("lr=")): run["scores"]["overall"]
        for study in record
        for run in study["runs"]
        if run["seed"] == 0 and run["name"].startswith(f"{recipe}/balance=sum,lr=")
    }
    (line,) = re.findall(rf"^\| {re.escape(row)}.*\((\S+)\) \|(.*)\|$", PAGE.text, re.M)
    for factor, cell in zip((0.5, 1, 2, 4, 8), line[1].split("|"), strict=True):
        if cell.strip():
            assert f"{scores[float(line[0]) * factor]:.3f}" == cell.strip()


def test_a_small_run(tmp_path: Path) -> None:
    """Early stop, best checkpoint, a page a run, and the same bits under the same seed."""

    def run(name: str, *settings: str) -> Path:
        out = tmp_path / name
        given = ["--set", *SMALL, "schedule=linear", "warmup=0.1", "epochs=30", *settings]
        assert train.main(["demo", "--out", str(out), "--device", "cpu", *given]) == 0
        return out

    stopping = ("eval_every=3", "patience=2", "average_best=2", "best_of=sts", "lr=1e-6")
    first, again = run("a", *stopping), run("b", *stopping)
    scored = [json.loads(line) for line in (first / "evaluations.jsonl").read_text().splitlines()]
    assert scored[-1]["step"] < 30 * 12  # by patience
    best = max(scored, key=lambda line: line["scores"]["sts"])
    assert len(scored) - scored.index(best) - 1 == 2
    weights = [
        load_file(next(out.glob("checkpoints/best*/*.safetensors"))) for out in (first, again)
    ]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    rates = [json.loads(line)["lr"] for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) == pytest.approx(rates[-1], rel=0.9)
    assert rates[0] < rates[5]  # it warms up
    assert report.main([str(first), str(again), "--out", str(tmp_path / "pages")]) == 0
    written = sorted(page.name for page in (tmp_path / "pages").iterdir())
    assert written == ["a.html", "b.html", "comparison.html"]


def test_batch_size_counts_examples_of_each_task(tmp_path: Path) -> None:
    """Twice the tasks' examples are twice the tokens of a step, more or less."""
    tokens = {}
    for size in (8, 16):
        out = tmp_path / str(size)
        given = ["--set", *SMALL, f"batch_size={size}", "--max-steps", "4"]
        assert train.main(["demo", "--out", str(out), "--device", "cpu", *given]) == 0
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        tokens[size] = sum(line["tokens"] for line in lines)
    assert 1.7 < tokens[16] / tokens[8] < 2.3
