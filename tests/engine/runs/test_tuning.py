"""Of the values that are tuned each point keeps the best, by the dev score of the first seed."""

import json
from pathlib import Path
from signal import Signals

import pytest
from rich.console import Console

from engine import sweep
from engine.cli.common import BAD_INPUT, DIED, DIVERGED
from engine.cli.series import tune_series
from engine.runs import experiments, job
from engine.runs.experiments import read_results
from engine.runs.job import End, InProcess, Outcome
from engine.runs.run import Run
from engine.runs.scoring import Scores, write_scores
from engine.runs.tuning import Tuning
from engine.utils.errors import DivergedError, InputError, OutOfMemoryError

BY_ERROR = ["best_of=sts", "tasks.sts.metrics=['mse']"]
BEST = {"sum": 2e-4, "pcgrad": 3e-4}


class Trained:
    """Training by hand: each balancing method has a learning rate that is best for it."""

    def __init__(self, folder: Path, monkeypatch, **failing: Exception) -> None:
        self.folder, self.failing, self.calls = folder, failing, []
        monkeypatch.setattr(experiments, "check_scores_of", lambda *_: None)
        monkeypatch.setattr(job, "resume", lambda recipe, at, _: Run(at, recipe, None, None))
        monkeypatch.setattr(job, "training_seconds", lambda _: 60.0)

    def train(self, run: Run, _steps: int | None) -> Signals | None:
        name = run.folder.relative_to(self.folder).as_posix().removeprefix("demo/")
        self.calls.append(name)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "recipe.toml").write_text(run.recipe.to_toml())
        if (failure := self.failing.get(name)) is not None:
            raise failure
        write_scores(run.folder, Scores("dev", 1, self.score(run)))
        return None

    def score(self, run: Run) -> dict[str, float]:
        off = abs(run.recipe.lr - BEST.get(run.recipe.balance, 0)) * 1e3 + run.recipe.seed / 10
        return {"sst": 0.5, "quora": 0.5, "sts": off, "overall": 1 - off}

    def status(self, *options: str, workers=None) -> int:
        self.calls.clear()
        line = ["demo", "--max-steps", "9", "--seeds", "3", *options, "--out", str(self.folder)]
        given = sweep.parser().parse_args(line)
        points, _ = sweep._points(["demo"], given)
        console = Console(width=200, highlight=False)
        return tune_series(self.folder, Tuning(points), workers or InProcess(self.train), console)


GRID = ["--grid", "balance=sum,pcgrad", "--tune", "lr=1e-4,2e-4,3e-4"]


def test_the_first_seed_tries_all_and_the_others_the_best(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch)
    assert trained.status(*GRID) == 0
    firsts = [f"balance={b},lr={lr}/seed-0" for b in BEST for lr in ("1e-4", "2e-4", "3e-4")]
    chosen = ["balance=sum,lr=2e-4", "balance=pcgrad,lr=3e-4"]
    assert trained.calls == [*firsts, *(f"{name}/seed-{n}" for name in chosen for n in (1, 2))]
    shown = capsys.readouterr().out.splitlines()
    assert "run 1 of 10" in shown
    assert any(line.startswith("run 10 of 10, about 0:") for line in shown)
    table = [line.split() for line in shown if line.startswith("demo  ")]
    assert [row[:4] for row in table] == [
        ["demo", "sum", "2e-4", "3"],
        ["demo", "pcgrad", "3e-4", "3"],
    ]
    start = "10 runs in all; lr by the dev score of the first seed, overall (mean)"
    at = next(n for n, line in enumerate(shown) if line.startswith(start))
    assert (
        shown[at + 1] == "demo/balance=sum: lr=2e-4 of lr=1e-4 0.900, lr=2e-4 1.000, lr=3e-4 0.900"
    )
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert [own["chosen"] for own in record.values()] == [f"demo/{name}" for name in chosen]
    assert [c["score"] for c in record["demo/balance=sum"]["candidates"]] == pytest.approx(
        [0.9, 1.0, 0.9]
    )
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert trained.status(*GRID) == 0
    assert not trained.calls
    assert {path: path.stat().st_mtime_ns for path in written} == written

    # Other values: the choice changes, and the file keeps the other points.
    monkeypatch.setitem(BEST, "sum", 4e-4)
    more = ["--grid", "balance=sum", "--tune", "lr=1e-4,3e-4,4e-4"]
    assert trained.status(*more) == 0
    assert trained.calls == [f"balance=sum,lr=4e-4/seed-{n}" for n in range(3)]
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert record["demo/balance=sum"]["settings"] == ["lr=4e-4"]
    assert record["demo/balance=pcgrad"]["settings"] == ["lr=3e-4"]


def test_the_folder_of_a_grid_is_taken_up(tmp_path, monkeypatch):
    """Seeds that a grid trained already are not trained again, chosen or not."""
    trained = Trained(tmp_path, monkeypatch)
    assert trained.status("--grid", "balance=sum,pcgrad", "--tune", "lr=1e-4,2e-4") == 0
    assert trained.status(*GRID) == 0
    last = [f"balance=pcgrad,lr=3e-4/seed-{n}" for n in (1, 2)]
    assert trained.calls == [f"balance={b},lr=3e-4/seed-0" for b in BEST] + last


def test_less_may_be_better_and_the_first_of_equals_is_kept(tmp_path, monkeypatch):
    trained = Trained(tmp_path, monkeypatch)
    tune = ["--tune", "lr=3e-4,1e-4", "batch_size=16,8"]
    assert trained.status("--set", "balance=sum", *BY_ERROR, *tune) == 0
    record = json.loads((tmp_path / "tuned.json").read_text())["demo"]
    assert (record["settings"], record["decided_by"]) == (["lr=3e-4", "batch_size=16"], "sts")


def test_candidates_that_fail_count_as_worst(tmp_path, monkeypatch, capsys):
    diverged, large = DivergedError("after step 3"), OutOfMemoryError("out of memory")
    failing = {
        "balance=sum,lr=2e-4/seed-0": diverged,
        "balance=sum,lr=1e-4/seed-0": large,
        **{f"balance=pcgrad,lr={lr}/seed-0": diverged for lr in ("1e-4", "2e-4", "3e-4")},
    }
    trained = Trained(tmp_path, monkeypatch, **failing)
    assert trained.status(*GRID) == DIVERGED  # of pcgrad nothing is left
    assert trained.calls[-2:] == ["balance=sum,lr=3e-4/seed-1", "balance=sum,lr=3e-4/seed-2"]
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("demo/balance=pcgrad: none of lr=1e-4 without a") for line in shown)
    assert "no result of demo/balance=sum,lr=2e-4/seed-0: after step 3" in shown
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert record["demo/balance=pcgrad"]["chosen"] is None
    reasons = [own.get("reason") for own in record["demo/balance=sum"]["candidates"]]
    assert reasons == ["out of memory", "after step 3", None]
    assert trained.status("--grid", "balance=sum", *GRID[2:]) == 0  # whole without the others
    trained.failing["balance=sum,lr=3e-4/seed-3"] = diverged
    assert trained.status("--grid", "balance=sum", *GRID[2:], "--seeds", "4") == DIVERGED


class Ends(InProcess):
    """Ends that a process of its own reports."""

    def __init__(self, ends: dict[str, End]) -> None:
        super().__init__(lambda *_: None)
        self.ends = ends

    def run(self, schedule, deadline=0.0):
        while (asked := schedule.next()) is not None:
            scores = {"sst": 0.1, "quora": 0.1, "sts": 0.1, "overall": 0.1}
            done = End(Outcome.DONE, scores=scores, seconds=1.0)
            schedule.add(asked, self.ends.get(asked.spec.name, done))


def test_a_run_that_died_or_got_bad_input_is_a_hole(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch)
    monkeypatch.setattr(experiments, "isfile", lambda _: True)
    for outcome, status in ((Outcome.DIED, DIED), (Outcome.BAD_INPUT, BAD_INPUT)):
        ends = {"demo/lr=2e-4/seed-0": End(outcome, "no luck")}
        assert trained.status("--tune", "lr=1e-4,2e-4", workers=Ends(ends)) == status
        assert "no result of demo/lr=2e-4/seed-0: no luck" in capsys.readouterr().out
        assert list(read_results(tmp_path)) == [f"demo/lr=1e-4/seed-{n}" for n in range(3)]
    (tmp_path / "results.json").unlink()
    ends = {"demo/lr=1e-4/seed-0": End(Outcome.BAD_INPUT, "no such file")}
    with pytest.raises(InputError, match="no such file"):  # the first: all may have it
        trained.status("--tune", "lr=1e-4,2e-4", workers=Ends(ends))


def test_draws_are_tuned_point_by_point(tmp_path, monkeypatch):
    trained = Trained(tmp_path, monkeypatch)
    draws = ["--random", "2", "--draw", "dropout=uniform:0:0.3", "--tune", "lr=1e-4,2e-4"]
    assert trained.status("--seeds", "1", *draws, "--set", "balance=sum") == 0
    record = json.loads((tmp_path / "tuned.json").read_text())
    assert len(record) == 2
    assert all(name.startswith("demo/dropout=") and "lr" not in name for name in record)
    assert {tuple(own["settings"]) for own in record.values()} == {("lr=2e-4",)}


def test_choices_that_are_damaged_are_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "tuned.json").write_text("[")
    trained = Trained(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=r"tuned\.json: not the choices of a tuning"):
        trained.status(*GRID)
    assert (tmp_path / "tuned.json").read_text() == "["
    assert not trained.calls  # found before hours of training


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["lr=1e-3,0.001"], "lr=1e-3 and demo/lr=0.001 have the same settings"),
        (["lr=1e-3,1e-4,0.0010"], "have the same settings"),
        (["balance=sum,'sum'"], "have the same settings"),
        (["balance=sum,pcgrad", "lr=1,1.0"], "have the same settings"),
        (["train=['sst'],[\"sst\"]"], "have the same settings"),
        (["seed=1,2"], "seed=1 and demo/seed=2 begin with other seeds.*--seeds"),
        (["lr=1,2", "seed=1,2"], "begin with other seeds"),
    ],
)
def test_candidates_that_are_the_same_or_differ_by_chance_are_refused(
    axes, message, tmp_path, monkeypatch
):
    trained = Trained(tmp_path, monkeypatch)
    with pytest.raises(InputError, match=f"^--tune: demo/.*{message}"):
        trained.status("--tune", *axes)
    assert not trained.calls
