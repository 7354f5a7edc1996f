"""The page of a run: what it shows is what the run's files say, and a browser shows it."""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from engine import report
from engine.reporting.plots import heatmap
from engine.reporting.run_data import (
    Answers,
    confusion,
    dev_answers,
    layer_conflicts,
    names,
    series,
)
from engine.runs.run import open_run
from engine.runtime.precision import pick_device
from engine.train import main
from engine.utils.errors import InputError
from tests.engine.conftest import TINY

SECTIONS = [
    "Curves",
    "Task gradients",
    "Conflict by layer",
    "Answers on the dev data",
    "Speed",
    "Examples that went wrong",
]


class Page(HTMLParser):
    """What a page consists of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.images: list[dict[str, str]] = []
        self.addresses: list[str] = []
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self._inside = tag
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        if self._inside == "h2":
            self.headings.append(data)
        self._inside = ""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["demo", "--out", str(folder), "--set", *TINY, "log_layer_cosines_every=1"]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run_folder) -> Path:
    out = run_folder.parent / "pages"
    assert report.main([str(run_folder), "--out", str(out)]) == 0
    return out / "tiny.html"


def test_the_page_has_everything_and_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.headings == SECTIONS
    assert len(parsed.images) == 4 + 4 + 2 + 3 + 1
    assert all(address.startswith("data:image/svg+xml;base64,") for address in parsed.addresses)


def test_scores_and_recipe_are_the_runs(page, run_folder):
    text = page.read_text()
    scores = json.loads((run_folder / "metrics.json").read_text())["scores"]
    shown = re.findall(r'<div class="card"><b>([\d.]+)</b>', text)
    assert shown == [f"{scores[task]:.3f}" for task in ("sst", "quora", "sts")]
    assert "log_layer_cosines_every = 1" in text


def test_sentences_are_shown_as_text(run_folder, tmp_path, monkeypatch):
    """A sentence that is markup must not become any."""
    answers = dev_answers(open_run(run_folder), pick_device("cpu"), 2)
    evil = "<script>alert('x')</script>"
    mistakes = [m._replace(sentences=(evil,)) for m in answers["sst"].mistakes]
    corrupted = answers | {"sst": answers["sst"]._replace(mistakes=mistakes)}
    monkeypatch.setattr("engine.reporting.page.dev_answers", lambda *_: corrupted)
    assert report.main([str(run_folder), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "tiny.html").read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_mistakes_are_the_worst_ones(run_folder):
    answers = dev_answers(open_run(run_folder), pick_device("cpu"), 5)
    for own in answers.values():
        certainties = [mistake.certainty for mistake in own.mistakes]
        assert certainties == sorted(certainties, reverse=True)
        assert len(own.mistakes) == 5
    assert all(mistake.label != mistake.prediction for mistake in answers["quora"].mistakes)
    sts = answers["sts"]
    assert sts.mistakes[0].certainty == pytest.approx(np.abs(sts.labels - sts.predictions).max())


def test_confusion_counts_every_example_once(run_folder):
    own: Answers = dev_answers(open_run(run_folder), pick_device("cpu"), 0)["sst"]
    counts = confusion(own)
    assert counts.shape == (5, 5)
    np.testing.assert_array_equal(counts.sum(1), np.bincount(own.labels.astype(int), minlength=5))
    assert counts.trace() / counts.sum() == pytest.approx(own.score)


def test_series_and_layers():
    lines = [
        {"step": 0, "losses": {"a": 1.0, "b": None}, "layer_cosines": {"l": {"a/b": -0.5}}},
        {"step": 1, "losses": {"a": 2.0}},
        {"step": 2, "losses": {"b": 3.0}, "layer_cosines": {"l": {"a/b": 0.1}}},
    ]
    assert names(lines, "losses") == ["a", "b"]
    np.testing.assert_array_equal(series(lines, "losses", "a"), [[0, 1], [1, 2]])
    np.testing.assert_array_equal(series(lines, "losses", "b"), [[2], [3]])
    np.testing.assert_array_equal(series(lines, "gpu", "power_w"), [[], []])
    layers, pairs, cosines, conflicts = layer_conflicts(lines)
    assert (layers, pairs) == (["l"], ["a/b"])
    assert (cosines.item(), conflicts.item()) == (pytest.approx(-0.2), 0.5)


def test_layers_of_phases_that_train_other_tasks():
    lines = [
        {"step": 0, "layer_cosines": {"l": {}, "heads.a": {}}},  # one task alone
        {"step": 1, "layer_cosines": {"l": {"a/b": -0.5}, "m": {"a/b": 0.5}, "heads.a": {}}},
        {"step": 2, "layer_cosines": {"m": {"b/c": 0.25}}},  # the other layer is frozen
    ]
    layers, pairs, cosines, conflicts = layer_conflicts(lines)
    assert (layers, pairs) == (["l", "m"], ["a/b", "b/c"])
    np.testing.assert_array_equal(cosines, [[-0.5, np.nan], [0.5, 0.25]])
    np.testing.assert_array_equal(conflicts, [[1, np.nan], [0, 0]])
    assert heatmap(layers, pairs, cosines, signed=True).startswith("data:image/svg+xml")


def changed(run_folder: Path, copy: Path, change: Callable[[int, dict], dict]) -> str:
    """Return the page of a run whose ``metrics.jsonl`` has other lines."""
    shutil.copytree(run_folder, copy)
    lines = map(json.loads, (run_folder / "metrics.jsonl").read_text().splitlines())
    changed = (json.dumps(change(number, line)) + "\n" for number, line in enumerate(lines))
    (copy / "metrics.jsonl").write_text("".join(changed))
    assert report.main([str(copy), "--out", str(copy / "pages")]) == 0
    return (copy / "pages" / f"{copy.name}.html").read_text()


def test_what_a_gpu_said_is_shown(run_folder, tmp_path):
    readings = {"power_w": 400.0, "temperature_c": 60.0, "memory_mib": 9e3, "sm_clock_mhz": 1755.0}
    text = changed(
        run_folder,
        tmp_path / "gpu",
        lambda step, line: line | {"gpu": readings | {"energy_j": 5e6 + 3600.0 * step}},
    )
    for title in ("GPU power, W", "GPU temperature, °C", "GPU memory, MiB", "GPU clock, MHz"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert "<td>5.0 Wh</td>" in text  # six steps


def test_a_section_without_records_says_how_to_get_them(run_folder, tmp_path):
    def bare(_step: int, line: dict) -> dict:
        return {key: value for key, value in line.items() if key != "layer_cosines"}

    text = changed(run_folder, tmp_path / "bare", bare)
    assert "--set log_layer_cosines_every=10" in text
    assert text.count("<figure>") == 4 + 4 + 3 + 1


@pytest.mark.parametrize("recipe", ["sst-linear", "three-phase"])
def test_runs_of_one_task_and_of_phases_have_pages(tmp_path, recipe):
    folder = tmp_path / recipe
    settings = ["--max-steps", "2", "--set", *TINY, "log_layer_cosines_every=1"]
    assert main([recipe, "--out", str(folder), *settings]) == 0
    assert report.main([str(folder), "--out", str(tmp_path / "pages")]) == 0
    assert Page(tmp_path / "pages" / f"{recipe}.html").headings == SECTIONS


def test_runs_that_cannot_be_reported(tmp_path, run_folder):
    with pytest.raises(InputError, match="holds no run"):
        report.main([str(tmp_path), "--out", str(tmp_path / "pages")])
    bare = shutil.copytree(run_folder, tmp_path / "bare")
    (bare / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no step yet"):
        report.main([str(bare), "--out", str(tmp_path / "pages")])


_LOOK = """<script>addEventListener("load", () => {
  const images = [...document.images].filter((i) => i.complete && i.naturalWidth > 100);
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = `shown ${images.length} wide ${wide}`;
});</script>"""


def seen_by_a_browser(page: Path, width: int, folder: Path) -> str:
    """Return how many pictures a browser shows, and whether the page is wider than its window."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    looked_at = folder / "page.html"
    looked_at.write_text(page.read_text().replace("</body>", f"{_LOOK}</body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command = [browser, *flags, f"--window-size={width},900", "--dump-dom", looked_at.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return re.search("<title>(.*)</title>", dom)[1]


@pytest.mark.parametrize("width", [1250, 600])
def test_a_browser_shows_every_picture(page, tmp_path, width):
    assert seen_by_a_browser(page, width, tmp_path) == "shown 14 wide false"
