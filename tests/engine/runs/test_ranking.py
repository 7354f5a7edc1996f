"""Runs of a series are ranked by the score that decides within each; a run that fails is named."""

import json
from pathlib import Path
from signal import Signals

import pytest
from rich.console import Console

from engine.cli.common import BAD_INPUT, DIVERGED
from engine.cli.series import halve_series, train_series
from engine.config import recipe as recipes
from engine.runs import experiments, halving, job
from engine.runs.experiments import Result, RunSpec, read_results, seeds_of
from engine.runs.halving import plan_halving
from engine.runs.job import InProcess
from engine.runs.ranking import check_baseline, print_results
from engine.runs.run import Run
from engine.runs.scoring import Criterion, Scores, write_scores
from engine.utils.errors import DivergedError, InputError, OutOfMemoryError

BY_ERROR = ("best_of=sts", "tasks.sts.metrics=['mse']")


class Trained:
    """Training by hand: the overall score rises with the learning rate, and so does sts."""

    def __init__(self, folder: Path, monkeypatch, **failing: Exception) -> None:
        self.folder, self.failing, self.calls = folder, failing, []
        for module in (halving, experiments):
            monkeypatch.setattr(module, "check_scores_of", lambda *_: None)
        monkeypatch.setattr(job, "resume", lambda recipe, at, _: Run(at, recipe, None, None))
        monkeypatch.setattr(job, "training_seconds", lambda _: 60.0)

    def train(self, run: Run, steps: int | None = None) -> Signals | None:
        self.calls.append(run.folder.parent.name)
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "recipe.toml").write_text(run.recipe.to_toml())
        if (failure := self.failing.get(f"{run.recipe.lr:g}")) is not None:
            raise failure
        if steps is None:
            write_scores(run.folder, Scores("dev", 1, self.score(run)))
        return None

    def score(self, run: Run) -> dict[str, float]:
        lr = run.recipe.lr
        return {"sst": -lr, "quora": 0.5, "sts": lr, "overall": lr}

    def series(self, specs: list[RunSpec]) -> int:
        console = Console(width=200, highlight=False)
        return train_series(self.folder, specs, InProcess(self.train), console)


def specs_of(*rates: str, settings: tuple[str, ...] = (), recipe: str = "demo") -> list[RunSpec]:
    own = ("max_steps=90", *settings)
    return [
        spec
        for rate in rates
        for spec in seeds_of(
            f"{recipe}/lr={rate}", recipes.load("demo", [*own, f"lr={rate}"]), 1, (f"lr={rate}",)
        )
    ]


def rates_shown(shown: str) -> list[str]:
    rows = [line.split() for line in shown.splitlines()]
    return [row[1] for row in rows if row and row[0] in ("demo", "other")]


def test_the_criterion_of_a_recipe():
    scores = {"sst": 0.5, "sts": 0.25, "overall": 0.75}
    overall = Criterion.of(recipes.load("demo"))
    assert (str(overall), overall.value(scores)) == ("overall (mean)", 0.75)
    error = Criterion.of(recipes.load("demo", BY_ERROR))
    assert (str(error), error.value(scores)) == ("sts (mse, less is better)", -0.25)


@pytest.mark.parametrize(
    ("settings", "order", "line"),
    [
        ((), ["0.3", "0.2", "0.1"], None),
        (("best_of=sst",), ["0.1", "0.2", "0.3"], "ranked by sst (accuracy)"),
        (BY_ERROR, ["0.1", "0.2", "0.3"], "ranked by sts (mse, less is better)"),
    ],
)
def test_the_table_of_a_sweep(settings, order, line, tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch)
    assert trained.series(specs_of("0.2", "0.1", "0.3", settings=settings)) == 0
    shown = capsys.readouterr().out
    assert rates_shown(shown) == order
    assert [text for text in shown.splitlines() if text.startswith("ranked")] == (
        [line] if line else []
    )


def test_a_sweep_in_which_different_scores_decide(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch)
    specs = [*specs_of("0.1", settings=BY_ERROR), *specs_of("0.2", recipe="other")]
    assert trained.series(specs) == 0
    said = (
        "ranked by overall, since best_of differs: sts (mse, less is better) in demo/lr=0.1, "
        "overall (mean) in other/lr=0.2"
    )
    shown = capsys.readouterr().out
    assert said in shown.splitlines()
    assert rates_shown(shown) == ["0.2", "0.1"]

    # Of runs that an earlier command left there, their own folder says it.
    assert trained.series(specs[:1]) == 0
    assert said in capsys.readouterr().out.splitlines()
    # The only one is ranked by nothing.
    assert trained.series([]) == 0
    (tmp_path / "results.json").unlink()
    assert trained.series(specs[:1]) == 0
    assert "ranked" not in capsys.readouterr().out.rpartition("run 1 of 1")[2]


def test_candidates_go_on_by_what_decides(tmp_path, monkeypatch, capsys):
    trained = Trained(tmp_path, monkeypatch)
    plan = plan_halving(specs_of("0.2", "0.1", "0.4", "0.3", settings=BY_ERROR), 10, 2)
    assert plan.steps == (10, 20, 40, 80, 90)
    console = Console(width=200, highlight=False)
    workers = InProcess(trained.train, trained.score)
    assert halve_series(tmp_path, plan, workers, console) == 0
    record = json.loads((tmp_path / "halving.json").read_text())
    assert record["ranked_by"] == "sts"
    first = [(place["candidate"], place["score"]) for place in record["rungs"][0]["ranking"]]
    assert first == [(f"demo/lr={rate}", float(rate)) for rate in ("0.1", "0.2", "0.3", "0.4")]
    assert list(read_results(tmp_path)) == ["demo/lr=0.1/seed-0"]
    shown = capsys.readouterr().out
    assert "ranked by sts (mse, less is better)" in shown.splitlines()
    assert rates_shown(shown) == ["0.1", "0.2", "0.3", "0.4"]


def test_candidates_by_different_scores_do_not_compare():
    with pytest.raises(InputError, match=r"best_of differs, overall of demo/lr=0.1 and sst of dem"):
        plan_halving([*specs_of("0.1"), *specs_of("0.2", settings=("best_of=sst",))], 10, 3)


def test_a_run_that_does_not_fit_in_memory_is_named_and_the_others_go_on(
    tmp_path, monkeypatch, capsys
):
    too_large = OutOfMemoryError("out of memory: lower batch_size (now 32)")
    trained = Trained(tmp_path, monkeypatch, **{"0.2": too_large})
    specs = specs_of("0.1", "0.2", "0.3")
    assert trained.series(specs) == BAD_INPUT
    assert list(read_results(tmp_path)) == ["demo/lr=0.1/seed-0", "demo/lr=0.3/seed-0"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"no result of demo/lr=0.2/seed-0: {too_large}"

    trained.failing["0.3"] = DivergedError("not finite")
    (tmp_path / "results.json").unlink()
    assert trained.series(specs) == DIVERGED
    trained.failing.clear()  # on a larger machine it is tried again
    assert trained.series(specs) == 0
    assert trained.calls[-2:] == ["lr=0.2", "lr=0.3"]


def result_of(group: str, *values: float, first: int = 0) -> dict[str, Result]:
    return {
        f"{group}/seed-{seed}": Result(group, {"sst": 0.5, "overall": value}, 60.0)
        for seed, value in enumerate(values, first)
    }


def shown_by(console_width: int = 200, **given) -> list[str]:
    console = Console(width=console_width, highlight=False, record=True, quiet=False)
    print_results(console, Path("none"), **given)
    return console.export_text().splitlines()


def test_paired_differences_have_a_column():
    results = {
        **result_of("demo/lr=0.1", 0.5, 0.56, 0.53),
        **result_of("demo/lr=0.2", 0.52, 0.57, 0.56),
        **result_of("demo/lr=0.3", 0.6, first=2),
        **result_of("demo/lr=0.4", 0.1, first=9),
    }
    specs = specs_of("0.1", "0.2", "0.3", "0.4", "0.5")
    head, *rows = shown_by(results=results, specs=specs, compare_to="lr=1e-1")
    assert head.split("  ")[-2].strip() == "overall against lr=1e-1"
    cells = {row.split()[1]: " ".join(row.partition("0.500")[2].split()) for row in rows}
    assert cells["0.1"] == "± 0.000 0.530 ± 0.030 baseline 1.0"
    assert cells["0.2"] == "± 0.000 0.550 ± 0.026 +0.020 ± 0.010 (3 seeds) 1.0"
    assert cells["0.3"] == "0.600 +0.070 (1 seed) 1.0"
    assert cells["0.4"] == "0.100 1.0"


def test_a_baseline_that_diverged_is_named():
    results = result_of("demo/lr=0.2", 0.52, 0.57)
    given = {"results": results, "specs": specs_of("0.1", "0.2"), "compare_to": "lr=0.1"}
    assert "no differences from demo/lr=0.1: none of its runs has a result" in shown_by(**given)


def test_tuned_settings_do_not_tell_the_baseline():
    """Of each family one group is shown; another command's group has no difference."""
    results = {
        **result_of("demo/lr=0.1", 0.5, 0.56),
        **result_of("demo/lr=0.2", 0.52, 0.57),
        **result_of("demo/lr=0.3", 0.7),
    }
    families = {"demo/lr=0.1": ("balance=sum",), "demo/lr=0.2": ("balance=pcgrad",)}
    given = {"results": results, "specs": specs_of("0.1", "0.2"), "families": families}
    _, other, second, first = shown_by(**given, compare_to="balance=sum")
    assert other.split() == ["demo/lr=0.3", "1", "0.500", "0.700", "1.0"]
    assert "+0.015 ± 0.007 (2 seeds)" in second
    assert "baseline" in first
    (line, *_) = shown_by(**given, compare_to="balance=mgda")
    assert line.startswith("no differences yet: --compare-to balance=mgda: no group has these")
    families["demo/lr=0.2"] = ("balance=sum",)  # not decided yet
    (line, *_) = shown_by(**given, compare_to="balance=sum")
    assert line.startswith("no differences yet: --compare-to balance=sum: several groups have")


def test_the_baseline_is_checked_before_training():
    specs = [
        spec
        for lr in ("1", "2")
        for spec in seeds_of(
            f"demo/balance=sum,lr={lr}", recipes.load("demo"), 1, ("balance=sum", f"lr={lr}")
        )
    ]
    with pytest.raises(InputError, match="several groups have these"):
        check_baseline("balance=sum", specs)
    check_baseline("balance=sum", specs, ["lr"])
    check_baseline("balance=sum,lr=2", specs)
    with pytest.raises(InputError, match="no group is told by lr"):
        check_baseline("lr=2", specs, ["lr"])
