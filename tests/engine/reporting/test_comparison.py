"""The page about several runs: their scores, what their recipes differ in, their curves."""

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from engine import report
from engine.reporting.comparison import score_row, score_rows
from engine.train import main
from engine.utils.errors import InputError
from tests.engine.conftest import TINY

from .test_page import Page, seen_by_a_browser


def train(folder: Path, *settings: str) -> Path:
    assert main(["demo", "--out", str(folder), "--set", *TINY, *settings]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one name, and one of two tasks whose name is markup."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        train(folder / "first" / "same"),
        train(folder / "second" / "same", "lr=2e-3", "tasks.sts.weight=2"),
        train(folder / "<b>two", 'train=["sst","quora"]', "balance=sum"),
    ]


@pytest.fixture(scope="module")
def page(runs: list[Path]) -> Path:
    out = runs[0].parents[1] / "pages"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    assert len([*out.iterdir()]) == 4
    return out / "comparison.html"


def table(page: Path, name: str) -> list[list[str]]:
    """Return the cells of a table, by rows, as a reader sees them."""
    html = re.search(rf'<table class="facts" id="{name}">(.*?)</table>', page.read_text(), re.S)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [
        [" ".join(unescape(re.sub(r"<[^>]*>", " ", cell)).split()) for cell in row] for row in cells
    ]


KEYS = {"lr", "balance", "tasks.sts.weight", "train"}
NAMES = ["first-same", "second-same", "<b>two"]


def test_scores_are_those_of_the_runs_with_their_differences(page, runs):
    scores = [json.loads((run / "metrics.json").read_text())["scores"] for run in runs]
    head, *rows = table(page, "scores")
    assert head == ["score", *NAMES]
    assert [row[0] for row in rows] == ["sst", "quora", "sts", "overall"]
    for name, *cells in rows:
        known = [own.get(name) for own in scores]
        assert cells[0] == f"{known[0]:.3f}"
        for cell, value in zip(cells[1:], known[1:], strict=True):
            expected = "" if value is None else f"{value:.3f} {value - known[0]:+.3f}"
            assert cell == expected
        best = re.findall(r'class="best">(-?\d\.\d+)', page.read_text())
        assert f"{max(value for value in known if value is not None):.3f}" in best


def test_settings_are_those_that_differ_and_no_others(page):
    head, *rows = table(page, "settings")
    assert head == ["setting", *NAMES]
    found = {name: cells for name, *cells in rows}
    assert found["lr"] == ["0.001", "0.002", "0.001"]
    assert found["train"] == ["sst, quora, sts", "sst, quora, sts", "sst, quora"]
    assert found["balance"] == ["pcgrad", "pcgrad", "sum"]
    assert found.keys() == KEYS


def test_each_number_has_a_picture_of_all_runs(page, runs):
    parsed = Page(page)
    sections = ["Dev scores", "Training losses", "Task gradients"]
    assert parsed.headings == ["Dev scores", "Settings that differ", "Runs", *sections]
    titles = [image["alt"] for image in parsed.images]
    scores, losses = ["sst", "quora", "sts", "overall"], ["sst", "quora", "sts"]
    pairs = ["sst/quora", "sst/sts", "quora/sts"]
    assert titles == [*scores, *losses, "Conflict rate", *pairs]
    assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in parsed.images)
    assert not [address for address in parsed.addresses if not address.startswith("data:")]
    steps = {row[0]: row[1:] for row in table(page, "runs")}["steps"]
    lines = [len((run / "metrics.jsonl").read_text().splitlines()) for run in runs]
    assert steps == [f"{count:,}" for count in lines]


def test_names_are_no_markup(page):
    assert "<b>two" not in page.read_text()


def test_a_run_without_scores_has_empty_cells(runs, tmp_path):
    copy = tmp_path / "unscored"
    shutil.copytree(runs[0], copy)
    (copy / "metrics.json").unlink()
    out = tmp_path / "pages"
    assert report.main([str(runs[1]), str(copy), "--out", str(out)]) == 0
    for name, first, second in table(out / "comparison.html", "scores")[1:]:
        assert float(first) >= -1, name
        assert second == ""


def test_one_run_is_not_compared(runs, tmp_path):
    copy = tmp_path / "comparison"  # its page may have this name
    shutil.copytree(runs[0], copy)
    assert report.main([str(copy), "--out", str(tmp_path / "pages")]) == 0
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["comparison.html"]
    assert "Settings that differ" not in (tmp_path / "pages/comparison.html").read_text()
    with pytest.raises(InputError, match=r"its page would be comparison\.html; rename the folder"):
        report.main([str(copy), str(runs[1]), "--out", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()


def test_nothing_is_replaced_unasked(runs, tmp_path):
    out = tmp_path / "pages"
    out.mkdir()
    (out / "comparison.html").write_text("mine")
    with pytest.raises(InputError, match=r"comparison\.html.*--force"):
        report.main([*map(str, runs[:2]), "--out", str(out)])
    assert [path.name for path in out.iterdir()] == ["comparison.html"]
    assert report.main([*map(str, runs[:2]), "--out", str(out), "--force"]) == 0
    assert "Settings that differ" in (out / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("scores", "texts", "differences", "best"),
    [
        ([0.5, 0.75], ["0.500", "0.750"], ["", "+0.250"], [False, True]),
        ([0.5, 0.5004], ["0.500", "0.500"], ["", "+0.000"], [True, True]),
        ([None, 0.5, 0.25], ["", "0.500", "0.250"], ["", "", ""], [False, True, False]),
        ([-2.5, None], ["-2.500", ""], ["", ""], [False, False]),
    ],
)
def test_a_row_of_scores(scores, texts, differences, best):
    cells = score_row("sst", scores).cells
    assert [cell.text for cell in cells] == texts
    assert [cell.difference for cell in cells] == differences
    assert [cell.best for cell in cells] == best


def test_means_of_other_tasks_are_not_compared():
    one, other = {"sst": 0.5, "overall": 0.5}, {"sts": 0.75, "overall": 0.75}
    rows = {row.name: row.cells for row in score_rows([one, other])}
    assert [*rows] == ["sst", "sts", "overall"]
    assert [cell.text for cell in rows["overall"]] == ["0.500", "0.750"]
    assert not any(cell.best or cell.difference for cell in rows["overall"])
    (_, last) = {row.name: row.cells for row in score_rows([one, one])}["overall"]
    assert (last.difference, last.best) == ("+0.000", True)
    assert score_rows([{}, {}]) == []


@pytest.mark.parametrize("width", [1250, 600])
def test_a_browser_shows_every_picture(page, tmp_path, width):
    assert seen_by_a_browser(page, width, tmp_path) == "shown 11 wide false"
