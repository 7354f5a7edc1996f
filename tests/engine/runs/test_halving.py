"""Successive halving: candidates are trained on in rungs, the best of each for longer."""

import json
import math
from pathlib import Path
from signal import Signals

import pytest
from rich.console import Console

from engine import sweep
from engine.cli.common import DIVERGED, STOPPED
from engine.cli.series import halve_series
from engine.config import recipe as recipes
from engine.reporting.run_data import read_evaluations, read_steps
from engine.runs import experiments, halving, job
from engine.runs.experiments import read_results, seeds_of
from engine.runs.halving import plan_halving
from engine.runs.job import InProcess
from engine.runs.run import Run, open_run
from engine.runs.scoring import Scores, write_scores
from engine.training.step import MultitaskStep
from engine.utils.errors import DivergedError, InputError, OutOfMemoryError

from ..conftest import TINY, tiny_run  # noqa: F401 (a fixture)
from ..in_process import workers_in_process
from ..whole_runs import assert_same_run, written_scores

PHASES = [
    "phases.a.max_steps=3",  # a rung ends with it
    "phases.b.max_steps=4",  # the next one in the middle of an epoch
    "schedule=linear",
    "warmup=0.3",
    "encoder.hidden_dropout_prob=0.1",
]
RATES = ("1e-4", "1e-3", "3e-3", "1e-2")
HALVING = ["--halving", "--min-steps", "3", "--eta", "2"]


def record_of(folder: Path) -> dict:
    return json.loads((folder / "halving.json").read_text())


def test_candidates_train_in_rungs_wherever_they_are_cut_off(
    tiny_run,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    folder, steps, scored = tmp_path / "runs", [], []
    arguments = ["demo", "--grid", f"lr={','.join(RATES)}", *HALVING, "--out", str(folder)]
    train_step, score = MultitaskStep.__call__, halving.score_newest

    def counted(self, batches, step, lr):
        steps.append(step)
        return train_step(self, batches, step, lr)

    def killed(*given):
        scored.append(given)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return score(*given)

    monkeypatch.setattr(MultitaskStep, "__call__", counted)
    monkeypatch.setattr(
        sweep,
        "workers_of",
        lambda device, *given: workers_in_process(device, *given, lambda run: killed(run, device)),
    )
    settings = ["--set", *TINY, *PHASES]
    with pytest.raises(KeyboardInterrupt):
        sweep.main([*arguments, *settings])
    assert len(record_of(folder)["scores"]) == 1
    assert sweep.main([*arguments, *settings]) == 0
    assert sorted(steps) == sorted([*range(3)] * 4 + [*range(3, 6)] * 2 + [6])  # each once

    rungs = record_of(folder)["rungs"]
    assert [rung["steps"] for rung in rungs] == [3, 6, 7]
    rankings = [[place["candidate"] for place in rung["ranking"]] for rung in rungs]
    assert list(map(len, rankings)) == [4, 2, 1]
    assert [rankings[0][:2], rankings[1][:1]] == [
        [name for name in rankings[0] if name in rankings[1]],
        rankings[2],
    ]
    for rung in rungs:
        scores = [place["score"] for place in rung["ranking"]]
        assert scores == sorted(scores, reverse=True)
    (winner,) = rankings[2]
    rate = winner.partition("=")[2]
    shown = capsys.readouterr().out.splitlines()[-5:]
    assert shown[0].split()[:4] == ["run", "lr", "rank", "steps"]
    assert shown[1].split()[:4] == ["demo", rate, "1", "7"]
    assert [line.split()[-1] for line in shown[1:]] == ["finished", *["stopped"] * 3]

    tiny_run("whole", settings=(*PHASES, f"lr={rate}"))
    assert_same_run(tmp_path / "whole", folder / winner / "seed-0")
    assert written_scores(tmp_path / "whole") == written_scores(folder / winner / "seed-0")
    assert (tmp_path / "whole/evaluations.jsonl").read_text() == (
        folder / winner / "seed-0/evaluations.jsonl"
    ).read_text()

    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert sweep.main([*arguments, *settings]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    stopped = open_run(folder / rankings[0][3] / "seed-0")  # as a report reads it
    assert [line["step"] for line in read_steps(stopped)] == [0, 1, 2]
    assert [line["step"] for line in read_evaluations(stopped)] == [2, 3]


class Trained:
    """Training by hand: a score that follows from the learning rate and the seed."""

    def __init__(self, folder: Path, monkeypatch, **failing) -> None:
        self.folder, self.failing, self.calls = folder, failing, []
        monkeypatch.setattr(job, "resume", self.open)
        monkeypatch.setattr(job, "training_seconds", lambda _: 60.0)
        monkeypatch.setattr(halving, "check_scores_of", lambda *_: None)
        monkeypatch.setattr(experiments, "check_scores_of", lambda *_: None)

    def open(self, recipe, folder: Path, _reading) -> Run:
        return Run(folder, recipe, None, None)

    def train(self, run: Run, steps: int | None):
        name = run.folder.relative_to(self.folder).as_posix()
        self.calls.append((name, steps))
        (run.folder / "recipe.toml").touch()
        failure = self.failing.get(f"{run.recipe.lr:g}", {}).get(steps)
        if isinstance(failure, Exception):
            raise failure
        if steps is None:
            write_scores(run.folder, Scores("dev", 1, self.score(run)))
        return failure

    def score(self, run: Run) -> dict[str, float]:
        value = math.nan if run.recipe.lr == 0.5 else run.recipe.lr + run.recipe.seed / 1000
        return {"sst": value, "quora": value, "sts": value, "overall": value}

    def status(self, plan) -> int:
        console = Console(width=200, highlight=False)
        return halve_series(self.folder, plan, InProcess(self.train, self.score), console)


def specs_of(*rates: str, seeds: int = 1, settings=("max_steps=90",)) -> list:
    return [
        spec
        for rate in rates
        for spec in seeds_of(
            f"demo/lr={rate}",
            recipes.load("demo", [f"lr={rate}", *settings]),
            seeds,
            (f"lr={rate}",),
        )
    ]


def ranked(folder: Path) -> list:
    return [
        [(p["candidate"].removeprefix("demo/lr="), p["outcome"]) for p in rung["ranking"]]
        for rung in record_of(folder)["rungs"]
    ]


def test_failed_candidates_rank_last_and_are_named(tmp_path, monkeypatch, capsys):
    trained = Trained(
        tmp_path,
        monkeypatch,
        **{"0.9": {10: DivergedError("not finite")}, "0.8": {30: OutOfMemoryError("too large")}},
    )
    rates = ("0.9", "0.1", "0.5", "0.8", "0.2", "0.3", "0.4", "0.6", "0.15")
    plan = plan_halving(specs_of(*rates), 10, 3)
    assert plan.steps == (10, 30, 90)
    assert trained.status(plan) == 0
    best = [(rate, "goes on") for rate in ("0.8", "0.6", "0.4")]
    rest = [(rate, "stopped") for rate in ("0.3", "0.2", "0.15", "0.1")]
    assert ranked(tmp_path) == [
        [*best, *rest, ("0.9", "failed"), ("0.5", "failed")],
        [("0.6", "goes on"), ("0.4", "stopped"), ("0.8", "failed")],
        [("0.6", "finished")],
    ]
    shown = capsys.readouterr().out.splitlines()
    assert "no result of demo/lr=0.9/seed-0: not finite" in shown
    assert "no result of demo/lr=0.8/seed-0: too large" in shown
    assert "no result of demo/lr=0.5/seed-0: dev scores at step 10 are not finite" in shown
    table = [line.split() for line in shown if line.startswith("demo  ")]
    assert " ".join(row[1] for row in table) == "0.6 0.4 0.3 0.2 0.15 0.1 0.8 0.9 0.5"
    calls = len(trained.calls)
    assert trained.status(plan) == 0
    assert len(trained.calls) == calls  # neither trained nor tried again


def test_all_that_fail_end_with_the_status_of_a_diverged_run(tmp_path, monkeypatch):
    failing = {rate: {10: DivergedError("not finite")} for rate in ("0.1", "0.2")}
    plan = plan_halving(specs_of("0.1", "0.2"), 10, 3)
    assert Trained(tmp_path, monkeypatch, **failing).status(plan) == DIVERGED
    assert list(map(len, ranked(tmp_path))) == [2, 0]


def test_the_last_candidate_skips_rungs_and_may_fail_in_the_end(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch, **{"0.2": {None: DivergedError("not finite")}})
    plan = plan_halving(specs_of("0.1", "0.2"), 2, 2)
    assert plan.steps == (2, 4, 8, 16, 32, 64, 90)
    assert trained.status(plan) == DIVERGED
    assert [steps for _, steps in trained.calls] == [2, 2, None]
    assert ranked(tmp_path)[-1] == [("0.2", "failed")]
    assert "no result of demo/lr=0.2/seed-0: not finite" in capsys.readouterr().out
    assert trained.status(plan) == DIVERGED
    assert len(trained.calls) == 3


def test_seeds_rank_by_their_mean_and_ties_by_their_order(tmp_path, monkeypatch):
    specs = [*specs_of("0.2", "0.1", "0.3", seeds=2), *specs_of("0.30", seeds=2)]
    trained = Trained(tmp_path, monkeypatch, **{"0.2": {10: DivergedError("not finite")}})
    assert trained.status(plan_halving(specs, 10, 2)) == 0
    assert [name for name, _ in ranked(tmp_path)[0]] == ["0.3", "0.30", "0.1", "0.2"]
    names = [name for name, steps in trained.calls if steps == 10]
    assert "demo/lr=0.2/seed-1" not in names  # the other seed had decided
    assert len(names) == 7
    finished = ["demo/lr=0.3/seed-0", "demo/lr=0.3/seed-1"]
    assert list(read_results(tmp_path)) == finished


def test_a_signal_stops_it_with_a_table_so_far(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch, **{"0.3": {10: Signals.SIGTERM}})
    plan = plan_halving(specs_of("0.1", "0.2", "0.3"), 10, 3)
    assert trained.status(plan) == STOPPED + 15
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("stopped by SIGTERM; the same command goes on")
    trained.failing.clear()
    assert trained.status(plan) == 0
    assert [name for name, steps in trained.calls if steps == 10][-1] == "demo/lr=0.3/seed-0"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "not the record of a halving"),
        ('{"eta": 3, "steps": [], "runs": "x"}', "not the record of a halving"),
        (
            '{"eta": 3, "steps": [10, 30, 90], "runs": [], "scores": {"a": {"10": {"sst": 1}}}}',
            "scores of a are not those of its tasks",
        ),
        ('{"eta": 3, "steps": [10, 30, 90], "runs": []}', "was made with other candidates"),
        ('{"eta": 3, "steps": [5, 90], "runs": []}', r"steps \[5, 90\], now \[10, 30, 90\]"),
    ],
)
def test_a_record_of_something_else(content, message, tmp_path, monkeypatch):
    (tmp_path / "halving.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Trained(tmp_path, monkeypatch).status(plan_halving(specs_of("0.1", "0.2"), 10, 3))


@pytest.mark.parametrize(
    ("specs", "min_steps", "message"),
    [
        (specs_of("0.1"), 10, "--halving: there is one candidate"),
        (specs_of("0.1", seeds=3), 10, "--halving: there is one candidate"),
        (specs_of("0.1", "0.2"), 90, "--min-steps 90: expected fewer than the 90 steps"),
        (specs_of("0.1", "0.2", settings=()), 9, "max_steps of demo/lr=0.1 is not given"),
        (
            [*specs_of("0.1"), *specs_of("0.2", settings=("max_steps=80",))],
            9,
            "max_steps differ, 90 of demo/lr=0.1 and 80 of demo/lr=0.2",
        ),
        (
            specs_of("0.1", "0.2", settings=("phases.a.max_steps=9", "phases.b.lr=1")),
            9,
            r"phases.b.max_steps of demo/lr=0.1 is not given",
        ),
        (
            seeds_of("a", recipes.load("demo", ["max_steps=90"]), 1)
            + seeds_of("b", recipes.load("sst-full", ["max_steps=90"]), 1),
            10,
            "a and b have scores on different tasks",
        ),
        (
            [
                spec
                for seed in (0, 1)
                for spec in seeds_of(
                    f"{seed}", recipes.load("superbert", ["max_steps=90", f"seed={seed}"]), 1
                )
            ],
            10,
            "after 10 steps phase .* of 0 has trained no task.*; raise --min-steps",
        ),
    ],
)
def test_a_halving_that_is_refused(specs, min_steps, message):
    with pytest.raises(InputError, match=message):
        plan_halving(specs, min_steps, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--halving"], "--halving: give the steps of the first rung by --min-steps N"),
        (["--min-steps", "3"], "--min-steps: has no effect without --halving"),
        (["--eta", "3"], "--eta: has no effect without --halving"),
    ],
)
def test_options_that_need_each_other(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        sweep.main(["demo", *options, "--out", str(tmp_path / "runs")])
    assert not any(tmp_path.iterdir())
