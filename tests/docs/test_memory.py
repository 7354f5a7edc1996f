"""The settings lower the parts that the page says; figures are the record's; the code holds."""

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.run_memory import SETTINGS, measure
from engine import export, train
from engine.cli.options import overrides, parser
from engine.config import recipe as recipes
from engine.training.batch_sizes import smaller_batches

from ..conftest import REPOSITORY
from .pages import Page

PAGE = Page("memory")
RECORD = REPOSITORY / "bench" / "results" / "cpu-bf16" / "run_memory.json"
BYTES = json.loads(RECORD.read_text())["results"]["bytes"]
PARTS = {
    "weights, with copies": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "activations of the largest batch": "activations",
    "evaluation, if larger than activations": "evaluation",
    "copy for a checkpoint": "checkpoint",
    "rows of the data": "rows",
}
SHORT = {"copy": "checkpoint", "activations": "activations", "gradients": "gradients"}
SHORT |= {"moments": "moments", "evaluation": "evaluation", "weights": "weights"}


def table(section: str) -> Iterator[list[str]]:
    for line in re.findall(r"^\| (.*) \|$", PAGE.section(section), re.MULTILINE)[2:]:
        yield [cell.strip() for cell in line.split("|")]


def mib(size: float) -> str:
    return f"{size / 2**20:,.0f}"


def total(parts: dict[str, int]) -> int:
    kept = ("weights", "gradients", "moments", "rows", "checkpoint")
    return sum(parts[name] for name in kept) + max(parts["activations"], parts["evaluation"])


def settings_of_the_page() -> Iterator[tuple[str, list[str], str, str]]:
    """Yield a row's setting as the bench calls it, the parts that it lowers, their MiB, the sum."""
    for setting, lowers, sizes, whole, _ in table("Lower it, in this order"):
        names = re.findall(r"`([^`]+)`", setting)
        name = names[0] if names else setting
        parts = [SHORT[word] for word in re.findall(r"\w+", lowers) if word in SHORT]
        if name in SETTINGS:
            yield name, parts, sizes, whole


def test_the_figures_are_the_records() -> None:
    of_run = {row[0]: row[-1] for row in table("What takes how much")}
    for shown, part in PARTS.items():
        assert of_run[shown] == mib(BYTES["as it is"][part])
    rows = list(settings_of_the_page())
    assert len(rows) == 10
    for name, parts, sizes, whole in rows:
        assert whole == mib(total(BYTES[name])), name
        shown = sizes.split(", ")
        assert shown == [mib(BYTES[name][part]) for part in parts], name
    assert f"Sum without the process: {mib(total(BYTES['as it is']))} MiB" in PAGE.text
    fp32 = BYTES["precision=fp32"]
    three = [mib(fp32[part]) for part in ("gradients", "activations", "evaluation")]
    assert f"has {three[0]}, {three[1]} and {three[2]}, {mib(total(fp32))} in all" in PAGE.text
    assert f"adds a copy ({mib(total(BYTES['ema_decay=0.999']))})" in PAGE.text


def test_the_sizes_are_the_formulas() -> None:
    """P from the encoder's own weights; K and w of the recipe in bf16."""
    parts = BYTES["as it is"]
    numel = parts["moments"] / 8
    assert parts["weights"] == pytest.approx(6 * numel, rel=1e-3)
    assert parts["gradients"] == pytest.approx(3 * numel * 2, rel=1e-3)
    assert parts["checkpoint"] == pytest.approx(12 * numel, rel=1e-3)
    assert numel == pytest.approx(22.6e6, rel=2e-3)
    assert parts["gradients"] == BYTES["balance=sum"]["gradients"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """The parts of a small recipe with each setting, from an exported encoder."""
    folder = tmp_path_factory.mktemp("memory") / "run"
    small = ["max_train_examples=96", "threads=1", "precision=bf16", "epochs=1"]
    shape = ["encoder.hidden_size=64", "encoder.num_attention_heads=2", "batch_size=24"]
    out = ["--out", str(folder), "--device", "cpu", "--max-steps", "2"]
    assert train.main(["demo", *out, "--set", *small, *shape]) == 0
    encoder = folder.with_name("encoder")
    assert export.main([str(folder), "--to", str(encoder)]) == 0
    settings = [*small, "batch_size=24", f"init={encoder}"]
    found = dict(measure("demo", settings, [name for name in SETTINGS if "max_length" not in name]))
    found |= dict(measure("demo", [*settings, "max_length=6"], ["max_length=32"]))
    return found


def test_each_setting_lowers_what_the_page_says(measured: dict[str, dict[str, int]]) -> None:
    before = measured["as it is"]
    for name, parts, *_ in settings_of_the_page():
        if name == "max_length=32":
            continue
        assert parts, name
        for part in parts:
            assert measured[name][part] < 0.95 * before[part], (name, part)
        for part in before.keys() - {*parts, "rows", "mapped_rows"}:
            assert measured[name][part] <= 1.05 * before[part], (name, part)
    for part in ("gradients", "activations", "evaluation"):
        assert before[part] < 0.95 * measured["precision=fp32"][part]
    assert measured["both"]["activations"] < measured["micro_batches=4"]["activations"]
    assert measured["balance=sum"] == before
    assert measured["ema_decay=0.999"]["weights"] > before["weights"]


def test_cut_texts_lower_activations(tmp_path: Path) -> None:
    small = ["max_train_examples=96", "threads=1", "epochs=1", "batch_size=24"]
    parts = [
        next(measure("demo", [*small, *length], ["as it is"]))[1]["activations"]
        for length in ([], ["max_length=6"])
    ]
    assert parts[1] < 0.8 * parts[0]


def test_the_dry_run_prints_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = PAGE.commands()
    options = parser().parse_args(line.split()[3:])
    assert isinstance(options, Namespace)
    assert options.dry_run
    recipes.load(options.recipe, overrides(options))
    small = ["max_train_examples=64", "encoder.hidden_size=32", "threads=1"]
    assert train.main(["demo", "--dry-run", "--device", "cpu", "--set", *small]) == 0
    printed = re.sub(r"\s+", " ", capsys.readouterr().out)
    for part in ("gradients", "moments", "activations of the largest batch", "evaluation"):
        assert f"│ {part}" in printed
    assert {row[0] for row in table("What takes how much")} == {*PARTS, "the process itself"}


def test_the_message_is_the_one_that_is_printed() -> None:
    class Batches:
        task, batch_size = "sst", 32

    said = smaller_batches(recipes.load("cgs"), [Batches()])  # type: ignore[list-item]
    assert f"error: out of memory: {said}\n" in PAGE.text


def test_pcgrad_keeps_as_many_gradients_as_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    PAGE.run_python()
    assert float(capsys.readouterr().out) == pytest.approx(4.0, abs=0.1)
