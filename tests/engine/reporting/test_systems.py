"""The report on the papers: every figure in it, and files that say what they should."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine import report, sweep
from engine.config import recipe as recipes
from engine.data.task_schema import FORMATS
from engine.reporting import mistakes, papers
from engine.reporting.outcomes import Outcome, read_outcomes, signature
from engine.reporting.run_data import Answers, Mistake
from engine.utils.errors import InputError

from ..conftest import TINY
from ..in_process import workers_in_process


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


def test_no_two_recipes_are_taken_for_each_other():
    known = [signature(recipes.load(name)) for name in recipes.names()]
    assert len(set(known)) == len(known)


@pytest.fixture(scope="module")
def series(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("series")
    arguments = ["cgs", "sst-linear", "demo", "--seeds", "2", "--max-steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "workers_of", workers_in_process)
        assert sweep.main([*arguments, "--out", str(folder), "--set", *TINY]) == 0
    return folder


def row_of(folder: Path, beginning: str) -> list[str]:
    """The cells of the only row of ``papers.md`` that begins so."""
    lines = (folder / "papers.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith(beginning)]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_tables_have_the_papers_figures_and_ours(series, tmp_path):
    assert report.main(["--papers", str(series), "--out", str(tmp_path)]) == 0
    cells = row_of(tmp_path, "| CGS |")
    scores = [
        json.loads((series / f"cgs/seed-{seed}/metrics.json").read_text())["scores"]
        for seed in (0, 1)
    ]
    ranked = row_of(tmp_path, "| `cgs` |")
    tasks = ("sst", "quora", "sts", "overall")
    for cell, own, task, theirs in zip(
        cells[3:7], ranked[1:5], tasks, (0.514, 0.722, 0.682, 0.639), strict=True
    ):
        values = [of_seed[task] for of_seed in scores]
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        assert cell == f"{theirs:.3f}, {mean:.3f} ± {deviation:.3f} ({mean - theirs:+.3f})"
        assert own == f"{mean:.3f} ± {deviation:.3f}"
    for difference in (
        "encoder from scratch",
        "2 seeds",
        "max_train_examples 64 (6016)",
        "epochs 3 (10)",
    ):
        assert difference in cells[7].split("; ")
    text = (tmp_path / "papers.md").read_text()
    assert "| SuperBERT | `superbert` | dev | 0.513 | 0.723 | 0.790 | 0.675 | not run |" in text
    names = {path.name for path in tmp_path.iterdir()}
    pictures = {"paper-a.png", "paper-c.png", "cgs.png", "sst-linear.png", "demo.png"}
    assert names == {"papers.json", "papers.md", "mistakes.md"} | pictures
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_papers_json_alone_gives_the_same_report(series, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert report.main(["--papers", str(series), "--out", str(first)]) == 0
    assert report.main(["--papers", str(first / "papers.json"), "--out", str(second)]) == 0
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    text = (first / "papers.json").read_text()
    assert str(series) not in text
    assert len(text) < 100_000


def test_sentences_are_left_out_where_asked(series, tmp_path):
    assert report.main(["--papers", str(series), "--no-texts", "--out", str(tmp_path)]) == 0
    worst = [
        mistake
        for outcome in read_outcomes(tmp_path / "papers.json")
        for found in outcome.answers.values()
        for mistake in found.worst
    ]
    assert worst
    assert not any(mistake.sentences for mistake in worst)
    lines = (tmp_path / "mistakes.md").read_text().splitlines()
    quoted = [line for line in lines if line.startswith("- ")]
    assert sorted(quoted) == sorted(f"- {one.label}, {one.prediction}, {one.id}" for one in worst)


def test_more_runs_join_those_of_a_papers_json(series, tmp_path):
    kept = tmp_path / "kept"
    assert report.main(["--papers", str(series / "cgs/seed-0"), "--out", str(kept)]) == 0
    assert "seeds" not in row_of(kept, "| CGS |")[7]
    places = [str(kept / "papers.json"), str(series), str(kept / "papers.json")]
    assert report.main(["--papers", *places, "--out", str(kept), "--force"]) == 0
    assert "2 seeds" in row_of(kept, "| CGS |")[7]
    outcomes = read_outcomes(kept / "papers.json")
    assert len(outcomes) == 6
    assert sum(bool(outcome.answers) for outcome in outcomes) == 3  # of each system's first run
    again = ["--papers", str(kept / "papers.json"), str(series), "--out", str(tmp_path / "again")]
    assert report.main(again) == 0
    assert read_outcomes(tmp_path / "again/papers.json") == outcomes


def test_runs_without_checkpoints_have_tables_but_no_mistakes(series, tmp_path, capsys):
    bare = tmp_path / "bare"
    ignored = shutil.ignore_patterns("checkpoints", "demo")
    shutil.copytree(series, bare, ignore=ignored)
    results = json.loads((bare / "results.json").read_text())
    kept = {name: value for name, value in results.items() if not name.startswith("demo")}
    (bare / "results.json").write_text(json.dumps(kept))
    capsys.readouterr()
    assert report.main(["--papers", str(bare), "--out", str(tmp_path / "out")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "no heatmap and no mistakes, for want of a checkpoint: cgs, sst-linear"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"papers.json", "papers.md", "paper-a.png", "paper-c.png"}


def test_a_run_that_is_not_done_is_left_out_of_its_series(series, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(series, begun)
    results = json.loads((begun / "results.json").read_text())
    del results["cgs/seed-1"]
    (begun / "results.json").write_text(json.dumps(results))
    (begun / "cgs/seed-1/metrics.json").unlink()
    for place in (begun, tmp_path):  # a folder of series, too
        assert report.main(["--papers", str(place), "--out", str(tmp_path / "out")]) == 0
        assert "seeds" not in row_of(tmp_path / "out", "| CGS |")[7]
        shutil.rmtree(tmp_path / "out")


def test_runs_of_different_settings_have_rows_of_their_own(series, tmp_path):
    assert report.main(["--papers", str(series / "cgs"), "--out", str(tmp_path)]) == 0
    outcomes = read_outcomes(tmp_path / "papers.json")
    changed = outcomes[1].model_copy(update={"settings": outcomes[1].settings | {"lr": 3e-4}})
    one, other = papers.rows_of([outcomes[0], changed])
    assert "lr 0.0003 (1e-05)" in other.differences
    assert [*one.differences, "lr 0.0003 (1e-05)"] == list(other.differences)
    (paper,) = [paper for paper in papers.read_papers() if paper.key == "a"]
    assert papers.markdown(paper, [one, other]).count("| CGS |") == 2


def test_what_no_report_can_be_made_from(series, tmp_path):
    def refused(*places: Path) -> str:
        with pytest.raises(InputError) as error:
            report.main(["--papers", *map(str, places), "--out", str(tmp_path / "out")])
        return str(error.value)

    assert "none of these runs" in refused(series / "demo")
    assert "holds no finished run" in refused(tmp_path)
    (tmp_path / "papers.json").write_text('[{"system": "cgs"}]')
    assert "not the outcomes of runs (Field required)" in refused(tmp_path / "papers.json")
    shutil.copytree(series / "cgs/seed-0", tmp_path / "run")
    scores = json.loads((tmp_path / "run/metrics.json").read_text())
    (tmp_path / "run/metrics.json").write_text(json.dumps(scores | {"split": "train"}))
    assert "scores on train; run engine.evaluate" in refused(tmp_path / "run")


HOSTILE = {
    "a path in the place of a system": {"system": "../../secret"},
    "an absolute path": {"system": "/tmp/secret"},
    "a name of no recipe": {"system": "cgz"},
    "a task that is a path": {"scores": {"../x": 0.5}},
    "settings that are none": {"settings": {"lr": "fast"}},
    "a score that is no number": {"scores": {"sst": float("nan")}},
    "counts that are no square": {"answers": {"sst": {"counts": [[1, 2], [3]]}}},
    "counts without end": {"answers": {"sst": {"counts": [[0] * 65] * 65}}},
    "no counts": {"answers": {"sst": {"counts": []}}},
}
FOUND = {"score": 0.5, "low": 0, "counts": [[1]], "over": 0, "under": 0, "worst": []}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_a_papers_json_from_elsewhere_names_no_other_files(tmp_path, fields):
    good = json.loads(outcome("cgs", answers={"sst": FOUND}).model_dump_json())
    answers = {name: FOUND | found for name, found in fields.get("answers", {}).items()}
    path, out = tmp_path / "in" / "papers.json", tmp_path / "in" / "out"
    path.parent.mkdir()
    for content, is_good in ((good, True), (good | fields | {"answers": answers}, False)):
        path.write_text(json.dumps([content]))
        if is_good:
            assert read_outcomes(path)[0].system == "cgs"
            continue
        with pytest.raises(InputError, match=r"not the outcomes of runs \(") as error:
            report.main(["--papers", str(path), "--out", str(out)])
        assert "\n" not in str(error.value)
    assert [found.name for found in tmp_path.rglob("*")] == ["in", "papers.json"]


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "cgs/../../elsewhere"])
def test_a_series_names_no_folder_outside(tmp_path, name):
    result = {"group": "cgs", "scores": {}, "seconds": 1.0}
    (tmp_path / "results.json").write_text(json.dumps({name: result}))
    with pytest.raises(InputError, match="is no folder below it"):
        report.main(["--papers", str(tmp_path), "--out", str(tmp_path / "out")])


def test_what_is_quoted_does_nothing(tmp_path):
    """Ids, sentences and settings from data and recipes, in tables and lists."""
    row = papers.Row([outcome("cgs", scores={})], ("x | y <b> [a](http://b)\x1b[2J\n# z",))
    (paper,) = [paper for paper in papers.read_papers() if paper.key == "a"]
    row.outcomes[0].scores.update({"sst": 0.5, "quora": 0.5, "sts": 0.5, "overall": 0.5})
    for text in (papers.markdown(paper, [row]), papers.ranking([row])):
        assert r"x \| y &lt;b\> \[a\](http://b)\\x1b\[2J \# z |" in text
    found = answers("sts", [0, 2.5, 5], [0.5, 1, 5])
    bad = Mistake("=1\r", ("<script>\n- x\x1b]0;t\x07",), "0", "4", 1.0)
    text = mistakes.markdown("x", {"sts": mistakes.findings(found._replace(mistakes=[bad]))})
    assert text.endswith("- 0, 4, =1, &lt;script\\> - x\\\\x1b\\]0;t\\\\x07\n")


def outcome(recipe: str, **fields) -> Outcome:
    """Of a run that did as its paper."""
    settings = recipes.load(recipe).model_dump(mode="json", exclude_defaults=True)
    as_paper = {"sst": 8544, "quora": 141_506, "sts": 6041}
    common = {"layers": 12, "width": 768, "pretrained": True, "examples": as_paper, "scores": {}}
    return Outcome(system=recipe, settings=settings, **(common | fields))


@pytest.mark.parametrize(
    ("recipe", "fields", "expected"),
    [
        ("bert-cos-wl", {}, []),
        ("bert-cos-wl", {"layers": 6, "width": 384}, ["encoder 6 layers of 384 (12 of 768)"]),
        ("bert-cos-wl", {"pretrained": False}, ["encoder from scratch"]),
        (
            "bert-cos-wl",
            {"examples": {"quora": 14_148}},
            ["quora 14,148 training examples (141,506)"],
        ),
        ("cgs", {"examples": {"quora": 14_148}}, []),  # both are cut to 6,016
        ("mtb-cls", {"examples": {"quora": 14_148}}, []),  # the first 10,000
        ("mtb-cls", {"examples": {"quora": 3000}}, ["quora 3,000 training examples (10,000)"]),
        ("best", {"layers": 6, "pretrained": False, "examples": {"quora": 3000}}, []),
    ],
)
def test_differences_from_the_paper_are_named(recipe, fields, expected):
    (row,) = papers.rows_of([outcome(recipe, **fields)])
    assert list(row.differences) == expected


def answers(task: str, labels: list[float], predictions: list[float]) -> Answers:
    worst = [Mistake("1", ("a | b",), "0", "4", 1.0)]
    arrays = (np.array(values, dtype=np.float32) for values in (labels, predictions))
    return Answers(FORMATS[task], "accuracy", 0.5, *arrays, worst)


def test_mistakes_are_counted_on_both_sides():
    found = answers("sts", [0, 2.5, 5], [0.5, 1, 5])
    text = mistakes.markdown("x", {"sts": mistakes.findings(found)})
    assert "| sts | 3 | 1 | 1 |" in text
    assert r"- 0, 4, 1, a \| b" in text


def test_heatmaps_count_examples_by_the_nearest_label():
    found = mistakes.counts(answers("sts", [0, 2.4, 2.5, 5], [0.49, 2.6, 5, 4.5]))
    expected = np.zeros((6, 6), dtype=int)
    for label, prediction in ((0, 0), (2, 3), (3, 5), (5, 5)):
        expected[label, prediction] += 1
    np.testing.assert_array_equal(found, expected)
