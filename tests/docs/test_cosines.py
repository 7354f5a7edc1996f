"""The page's figures are the records', its code takes noise off, and its run logs what it lists."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine import report, train

from ..conftest import REPOSITORY
from .pages import Page

PAGE = Page("cosines")
RECORDS = REPOSITORY / "bench" / "results" / "balancing"
NOISE = json.loads((RECORDS / "noise.json").read_text())["results"]


def rows(section: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", PAGE.section(section), re.MULTILINE)
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def runs(name: str, prefix: str) -> list[dict[str, Any]]:
    studies = json.loads((RECORDS / f"{name}.json").read_text())
    found = [run for study in studies for run in study["runs"]]
    return [run for run in found if run["name"].startswith(f"{prefix}/balance=sum")]


def test_normal_cosines_are_the_records() -> None:
    three = runs("three_tasks", "three_tasks") + runs("three_tasks-fresh", "three_tasks")
    at_best = [
        run for run in three if run["point"] in (["balance=sum"], ["balance=sum", "lr=1.5e-4"])
    ]
    of_rows = {
        "SST, Quora, STS": at_best,
        "the same, `best`": runs("best", "best"),
        "five tasks": [
            run for run in runs("five_tasks", "five_tasks") if "lr=5e-4" in run["point"]
        ],
        "`demo-kinds`": runs("demo", "demo-kinds"),
    }
    shown = {row[0]: row[1:] for row in rows("What is normal")}
    for start, own in of_rows.items():
        (cells,) = [cells for name, cells in shown.items() if name.startswith(start)]
        cosines = [cosine for run in own for cosine in run["cosines"].values()]
        rates = [run["conflict_rate"] for run in own]
        assert len(own) >= 3
        for cell, values in zip(cells, (cosines, rates), strict=True):
            low, high = map(float, cell.split(" to "))
            assert (low, high) == pytest.approx((min(values), max(values)), abs=0.0051), start
    assert len(at_best) == 11


def test_the_noise_is_the_records() -> None:
    table = {row[0]: row[1:] for row in rows("What is noise") if row[0].isdigit() and len(row) == 7}
    true = {row[0]: row[1:] for row in rows("What is noise") if row[0].isdigit() and len(row) == 4}
    for place in NOISE["places"]:
        single = place["by_batches"]["1"]
        cosines = [*single["same_task"].values(), *single["tasks"].values()]
        for cell, cosine in zip(table[str(place["step"])], cosines, strict=True):
            shown = [float(number) for number in cell.split(" ± ")]
            assert shown == pytest.approx([cosine["mean"], cosine["deviation"]], abs=0.00501)
        for cell, cosine in zip(
            true[str(place["step"])], place["true_cosines"].values(), strict=True
        ):
            shown = [float(number) for number in cell.split(" ± ")]
            assert shown == pytest.approx([cosine["mean"], cosine["error"]], abs=0.00501)
    low, high = re.findall(r"(\d+) to (\d+) % of a", PAGE.text)[0]
    last = NOISE["places"][-1]["noise"].values()
    assert (int(low), int(high)) == (round(100 * min(last)), round(100 * max(last)))


class Planted(nn.Module):
    """Weights whose gradient for each task is a known mean, and noise."""

    def __init__(self, means: Tensor, noise: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(means.shape[1]))
        self.means, self.noise = means, noise
        self.generator = torch.Generator().manual_seed(0)

    def losses(self) -> list[Tensor]:
        size = self.means.shape[1]
        drawn = torch.randn(self.means.shape, generator=self.generator) * self.noise / size**0.5
        return [self.weight @ gradient for gradient in self.means + drawn]


@pytest.mark.parametrize("cosine", [-0.5, 0.8])
def test_the_code_takes_noise_off(cosine: float) -> None:
    means = torch.zeros(2, 5000)
    means[0, 0], means[1, 0], means[1, 1] = 1.0, cosine, (1 - cosine**2) ** 0.5
    model = Planted(means, noise=2.0)
    scope = PAGE.run_python("Measure it in your loop", model=model, losses=model.losses)
    found, noise = scope["without_noise"](model, model.losses, 2, batches=24)
    assert found[0, 1].item() == pytest.approx(cosine, abs=0.1)
    torch.testing.assert_close(found.diagonal(), torch.ones(2, dtype=torch.float64))
    assert noise.tolist() == pytest.approx([0.8, 0.8], abs=0.06)
    # A single step's cosine is a fifth of it.
    assert scope["cosines"][0, 1].item() == pytest.approx(cosine / 5, abs=0.1)
    assert scope["conflict_rate"].item() == (scope["cosines"][0, 1] < 0)
    assert scope["weights"].shape == (1, 2)
    assert not model.weight.detach().any()  # nothing was updated


def test_a_run_logs_what_the_page_lists(tmp_path: Path) -> None:
    (first, second) = PAGE.commands("See it in a report")
    settings = ["max_train_examples=64", "epochs=1", "encoder.hidden_size=32", "threads=1"]
    extra = first.partition("--set ")[2]
    out = tmp_path / "run"
    arguments = ["demo", "--out", str(out), "--device", "cpu", "--set", extra, *settings]
    assert train.main(arguments) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = {row[0].strip("`") for row in rows("What is logged")} - {"key", "---"}
    assert logged <= lines[0].keys()
    assert len(logged) == 6
    pair = "sst/quora"
    assert lines[0]["cosines"].keys() >= {pair}
    assert all(
        set(layer) == set(lines[0]["cosines"]) for layer in lines[0]["layer_cosines"].values()
    )
    rate = statistics.mean(cosine < 0 for cosine in lines[0]["cosines"].values())
    assert lines[0]["conflict_rate"] == pytest.approx(rate)
    assert "engine.report RUN --out" in second
    assert report.main([str(out), "--out", str(tmp_path / "pages")]) == 0
    page = (tmp_path / "pages" / "run.html").read_text()
    for picture in ("Conflict rate", "Cosines between task gradients", "Conflict by layer"):
        assert picture in page


def test_gains_are_those_of_the_results() -> None:
    """Each number of the decision table is in the pages that it is taken from."""
    sources = Page("results").text + Page("guide-multitask").text
    for row in rows("When balancing helps, and which method")[2:]:
        for number in re.findall(r"[+-]0\.\d{3}", row[-1]):
            assert number in sources
