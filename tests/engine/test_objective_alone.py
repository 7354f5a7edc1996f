"""Runs of objectives alone: they train no task, have no scores, and are whole all the same."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import evaluate, export, fill, report, sweep
from engine.config import recipe as recipes
from engine.runs.data_paths import data_folder
from engine.train import main
from engine.utils.errors import InputError

from .conftest import TINY
from .in_process import workers_in_process
from .whole_runs import written_scores

WORDS = ["film", "plot", "song", "joke", "town", "boat", "café", "road"]
TEXTS = "".join(f"The {one} was as good as the {other}.\n" for one in WORDS for other in WORDS)
NOT_SCORED = "not scored: no task was trained; the weights are those of the last step"

Train = Callable[..., str]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The demo corpus cut to a few rows, and a text file beside it."""
    folder = tmp_path_factory.mktemp("data")
    for path in data_folder(recipes.load("demo")).iterdir():
        lines = path.read_text().splitlines(keepends=True)
        (folder / path.name).write_text("".join(lines[:20]))
    (folder / "texts.txt").write_text(TEXTS)
    return folder


def settings_of(data: Path, *settings: str) -> list[str]:
    objective = ["objectives.lm.kind=masked_lm", 'objectives.lm.files=["texts.txt"]']
    given = ["batch_size=4", *objective, *settings]
    return ["--max-steps", "2", "--data", str(data), "--set", *TINY, *given]


@pytest.fixture
def train(data, tmp_path, capsys) -> Train:
    """Train in ``tmp_path / run``; return what was printed."""

    def run(*settings: str, options: tuple[str, ...] = (), recipe: str = "demo") -> str:
        folder = str(tmp_path / "run")
        assert (
            main([recipe, "--out", folder, *options, *settings_of(data, "train=['lm']", *settings)])
            == 0
        )
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("objectives.lm.kind=simcse",),
        ("phases.one.train=['lm']", "phases.two.lr=1e-4"),
    ],
    ids=["masked_lm", "simcse", "phases"],
)
def test_a_run_ends_well_and_says_that_it_is_not_scored(train, tmp_path, settings):
    for options in ((), ("--resume",)):
        *_, said, wrote = train(*settings, options=options).splitlines()
        assert (said, wrote) == (NOT_SCORED, f"wrote {tmp_path / 'run'}")
    assert not written_scores(tmp_path / "run")


def test_what_works_on_a_run_works_on_one_without_scores(train, tmp_path, capsys):
    train()
    folder, card = tmp_path / "run", tmp_path / "export/README.md"
    assert fill.main([str(folder)]) == 0
    assert report.main([str(folder), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "run.html").stat().st_size > 1000
    assert export.main([str(folder), "--to", str(card.parent)]) == 0
    assert "None were measured." in card.read_text()
    assert "trained on lm, with a head" in " ".join(card.read_text().split())
    assert evaluate.main([str(folder)]) == 0
    assert json.loads((folder / "metrics.json").read_text())["step"] == 2


def test_several_seeds(train, tmp_path):
    for _ in range(2):  # the second time nothing is left to do
        *_, heads, line = train(options=("--seeds", "2")).splitlines()
        assert heads.split() == ["run", "seeds", "minutes"]
        assert line.split()[0] == "2"
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert [result["scores"] for result in results.values()] == [{}, {}]


def test_a_sweep_lists_what_is_not_scored_last(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("engine.sweep.workers_of", workers_in_process)
    grid = ["--grid", "train=['lm'],['sst']"]
    arguments = ["demo", "--out", str(tmp_path / "all"), *grid, *settings_of(data)]
    assert sweep.main(arguments) == 0
    *_, heads, scored, unscored = capsys.readouterr().out.splitlines()
    assert heads.split() == ["run", "train", "seeds", "sst", "quora", "sts", "overall", "minutes"]
    assert scored.split()[:2] == ["demo", "['sst']"]
    assert len(scored.split()) == 8
    assert unscored.split()[:2] == ["demo", "['lm']"]
    assert len(unscored.split()) == 4


def test_the_report_on_papers_takes_scored_runs(train, tmp_path):
    """A paper's recipe, trained on its objective alone, is no result of that system."""
    train("phases={}", "train=['masked_lm']", recipe="superbert")
    with pytest.raises(InputError, match=r"none of these runs .* and scored"):
        report.main(["--papers", str(tmp_path / "run"), "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("phases", "fits"),
    [
        (("lm",), True),
        (("sst",), True),
        (("lm", "lm"), True),
        (("lm", "sst"), True),
        (("sst", "lm", "sst"), True),
        (("sst", "lm"), False),
        (("lm", "sst", "lm"), False),
    ],
)
def test_phases_end_with_a_task_or_train_none(phases, fits):
    settings = ["objectives.lm.kind=masked_lm"]
    settings += [f"phases.p{number}.train=['{name}']" for number, name in enumerate(phases)]
    if fits:
        assert recipes.load("demo", settings).is_scored == ("sst" in phases)
        return
    with pytest.raises(InputError, match=r"phases: the last one trains no task.*; train a task"):
        recipes.load("demo", settings)


def test_scores_on_other_data_are_not_called_dev_scores(train, tmp_path):
    first = train("train=['sst']")
    assert evaluate.main([str(tmp_path / "run"), "--split", "train"]) == 0
    again = train("train=['sst']", options=("--resume",))
    assert "dev scores, best epoch (step 2)" in first
    assert "train scores, best epoch (step 2)" in again


# What was found out about the files of its texts


@pytest.mark.parametrize("kind", ["masked_lm", "simcse"])
@pytest.mark.parametrize(
    ("encoding", "known_as"),
    [("utf-8", ""), ("utf-8-sig", ""), ("utf-16", "UTF-16-LE"), ("utf-32", "UTF-32-LE")],
)
def test_the_encoding_of_a_text_file_is_said(train, data, kind, encoding, known_as):
    name = f"{encoding}.txt.gz"
    (data / name).write_bytes(gzip.compress(TEXTS.encode(encoding)))
    shown = train(f"objectives.lm.files=['{name}']", f"objectives.lm.kind={kind}")
    said = f"lm: read {name} as {known_as}, by its byte order mark"
    assert shown.splitlines().count(said) == bool(known_as)
    assert shown.count("read ") == bool(known_as)


def test_so_is_that_of_the_tasks_that_its_sentences_are_of(train, data):
    path = data / "ids-sst-train.csv"
    content = path.read_text()
    path.write_text(content, encoding="utf-16")
    try:
        shown = train("objectives.lm.files=[]", "objectives.lm.sentences_of=['sst']")
        both = train("objectives.lm.files=[]", "train=['lm','sst']", options=("--seeds", "1"))
    finally:
        path.write_text(content)
    said = "sst: read ids-sst-train.csv as UTF-16-LE, by its byte order mark"
    assert shown.splitlines().count(said) == 1
    assert both.splitlines().count(said) == 1


def test_rows_that_were_skipped_are_counted(train, data):
    path = data / "ids-sst-train.csv"
    content = path.read_text()
    path.write_text(content + "\tx\t\t1\n")
    try:
        shown = train("objectives.lm.sentences_of=['sst']", "on_bad_row=skip")
    finally:
        path.write_text(content)
    assert "lm: 1 rows of sst skipped (" in shown
