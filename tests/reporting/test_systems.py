"""The report on the papers: every figure in it, and files that say what they should."""

import json

import numpy as np
import pytest

from engine import recipe as recipes
from engine import report, sweep
from engine.data.formats import FORMATS
from engine.errors import InputError
from engine.reporting import mistakes, papers
from engine.reporting.record import Answers, Mistake
from engine.run import open_run

from ..engine.conftest import TINY


def test_every_system_has_a_recipe_and_every_recipe_of_a_paper_a_system():
    listed = [(paper, system) for paper in papers.read_papers() for system in paper.systems]
    assert {system.recipe for _, system in listed} == set(recipes.of_papers())
    for paper, system in listed:
        recipe = recipes.load(system.recipe)
        assert recipe.paper.startswith(paper.title), system
        assert system.scores.keys() <= {*recipe.tasks, "overall"}
    assert len({recipes.load(name).paper for name in recipes.of_papers()}) == len(
        recipes.of_papers()
    )


@pytest.fixture(scope="module")
def series(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("series")
    arguments = ["cgs", "sst-linear", "demo", "--seeds", "2", "--max-steps", "2"]
    assert sweep.main([*arguments, "--out", str(folder), "--set", *TINY]) == 0
    return folder


def test_the_tables_have_the_papers_figures_and_ours(series, tmp_path):
    assert report.main(["--papers", str(series), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "papers.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| CGS |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    scores = [
        json.loads((series / f"cgs/seed-{seed}/metrics.json").read_text())["scores"]
        for seed in (0, 1)
    ]
    for cell, task, theirs in zip(
        cells[3:7], ("sst", "quora", "sts", "overall"), (0.514, 0.722, 0.682, 0.639), strict=True
    ):
        values = [of_seed[task] for of_seed in scores]
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        assert cell == f"{theirs:.3f}, {mean:.3f} ± {deviation:.3f} ({mean - theirs:+.3f})"
    for difference in ("encoder from scratch", "2 seeds", "limit 64 (6016)", "epochs 3 (10)"):
        assert difference in cells[7]
    assert "| SuperBERT | `superbert` | dev | 0.513 | 0.723 | 0.790 | 0.675 | not run |" in text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *("papers.md", "mistakes.md", "paper-a.png", "paper-c.png", "cgs.png", "sst-linear.png")
    }
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_runs_of_no_paper_are_refused(series, tmp_path, capsys):
    with pytest.raises(InputError, match="none of these runs"):
        report.main(["--papers", str(series / "demo"), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="holds no run"):
        report.main(["--papers", str(tmp_path), "--out", str(tmp_path / "out")])


def test_settings_that_differ_are_named_with_both_values(series):
    run = open_run(series / "cgs" / "seed-0")
    changed = run.recipe.model_copy(update={"lr": 3e-4})
    changes = list(papers._changes(changed, recipes.load("cgs")))
    assert "lr 0.0003 (1e-05)" in changes
    assert not any(change.startswith(("seed", "data", "encoder")) for change in changes)


def answers(task: str, labels: list[float], predictions: list[float]) -> Answers:
    worst = [Mistake("1", ("a | b",), "0", "4", 1.0)]
    arrays = (np.array(values, dtype=np.float32) for values in (labels, predictions))
    return Answers(FORMATS[task], 0.5, *arrays, worst)


def test_mistakes_are_counted_on_both_sides():
    text = mistakes.markdown("x", {"sts": answers("sts", [0, 2.5, 5], [0.5, 1, 5])})
    assert "| sts | 3 | 1 | 1 |" in text
    assert r"- 0, 4: a \| b" in text


def test_heatmaps_count_examples_by_the_nearest_label():
    found = mistakes.counts(answers("sts", [0, 2.4, 2.5, 5], [0.49, 2.6, 5, 4.5]))
    expected = np.zeros((6, 6), dtype=int)
    for label, prediction in ((0, 0), (2, 3), (3, 5), (5, 5)):
        expected[label, prediction] += 1
    np.testing.assert_array_equal(found, expected)
