"""Series of runs: seeds, grids, recipes; cut off and gone on with."""

import json
import statistics

import pytest

from engine import sweep, train
from engine.utils.errors import InputError

from .conftest import TINY

SETTINGS = ["--max-steps", "2", "--set", *TINY]


def scores_of(folder) -> dict:
    results = json.loads((folder / "results.json").read_text())
    return {name: result["scores"]["overall"] for name, result in results.items()}


def test_seeds_give_mean_and_deviation(tmp_path, capsys):
    arguments = ["demo", "--seeds", "2", "--seed", "3", "--out", str(tmp_path / "runs"), *SETTINGS]
    assert train.main(arguments) == 0
    scores = scores_of(tmp_path / "runs")
    assert list(scores) == ["seed-3", "seed-4"]
    values = list(scores.values())
    assert values[0] != values[1]
    expected = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
    assert expected in capsys.readouterr().out


def test_a_grid_trains_every_point_once(tmp_path):
    arguments = ["demo", "sst-finetune", "--grid", "lr=1e-3,1e-4", "--out", str(tmp_path)]
    assert sweep.main([*arguments, *SETTINGS]) == 0
    names = [f"{recipe}/lr={lr}/seed-0" for recipe in ("demo", "sst-finetune") for lr in LRS]
    assert list(scores_of(tmp_path)) == names
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sweep.main([*arguments, *SETTINGS]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written


LRS = ("1e-3", "1e-4")


def test_out_of_time_it_stops_and_goes_on_later(tmp_path):
    arguments = ["demo", "--seeds", "2", "--out", str(tmp_path), *SETTINGS]
    assert sweep.main([*arguments[: -len(SETTINGS)], "--minutes", "0", *SETTINGS]) == 128 + 15
    assert not (tmp_path / "results.json").exists()
    assert sweep.main(arguments) == 0
    assert list(scores_of(tmp_path)) == ["demo/seed-0", "demo/seed-1"]


@pytest.mark.parametrize("axis", ["lr", "lr=", "lr=1,,2"])
def test_an_axis_without_values(axis):
    with pytest.raises(InputError, match="expected key=value,value"):
        sweep.grid_points([axis])


@pytest.mark.parametrize(
    ("one", "other", "field"),
    [
        ("lr=1,2", "lr=3", "lr"),
        ("surgery=layer", "balance_granularity=model,tensor", "balance_granularity"),
        ("tasks.sst.first_n=1", "tasks.sst.first=2", "tasks.sst.first_n"),
        ("phases.a.order=cycle", "phases.a.task_schedule=cycle", "phases.a.task_schedule"),
    ],
)
def test_a_field_by_two_axes(one, other, field):
    """By either name: its last value alone would be trained, under the labels of both."""
    with pytest.raises(InputError, match=f"--grid {other}: {field} is given already"):
        sweep.grid_points([one, other])


def test_more_runs_than_anybody_waits_for(tmp_path):
    """A series is planned as a whole: a huge one would fill the memory."""
    for arguments in (["--seeds", "1000000000"], ["--seed", "2147483647", "--seeds", "2"]):
        with pytest.raises(InputError, match=r"--seeds \d+: expected at most (10000|1), "):
            train.main(["demo", *arguments, "--out", str(tmp_path / "runs")])
    with pytest.raises(InputError, match=r"--grid: 1000000000000 points; give at most 10000"):
        sweep.grid_points([f"{key}=0,1,2,3,4,5,6,7,8,9" for key in "abcdefghijkl"])
    assert not any(tmp_path.iterdir())


def test_no_grid_is_one_point():
    assert sweep.grid_points([]) == [()]
    assert sweep.grid_points(["a=1,2", "b=3"]) == [("a=1", "b=3"), ("a=2", "b=3")]


def test_results_that_are_damaged(tmp_path):
    (tmp_path / "results.json").write_text("[")
    with pytest.raises(InputError, match="not the results of a series"):
        sweep.main(["demo", "--out", str(tmp_path), *SETTINGS])


def test_a_sweep_compares_with_one_of_its_groups(tmp_path, capsys):
    arguments = ["demo", "--grid", "balance=sum,pcgrad", "--seeds", "2", "--out", str(tmp_path)]
    assert sweep.main([*arguments, "--compare-to", "balance=sum", *SETTINGS]) == 0
    scores = scores_of(tmp_path)
    pairs = [
        scores[f"demo/balance=pcgrad/seed-{seed}"] - scores[f"demo/balance=sum/seed-{seed}"]
        for seed in (0, 1)
    ]
    shown = capsys.readouterr().out
    cell = f"{statistics.mean(pairs):+.3f} ± {statistics.stdev(pairs):.3f} (2 seeds)"
    assert cell in shown
    assert "overall against balance=sum" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare-to", "balance=mgda"], "no group has these settings; values of balance: sum"),
        (["--compare-to", "lr=1"], "no group is told by lr"),
        (["--compare-to", "sum"], "expected KEY=VALUE"),
        (["--compare-to", "balance=sum", "--halving", "--min-steps", "1"], "no effect with --halv"),
    ],
)
def test_a_baseline_that_is_none_is_refused_before_training(tmp_path, arguments, message):
    given = ["demo", "--grid", "balance=sum,pcgrad", "--out", str(tmp_path / "runs"), *arguments]
    with pytest.raises(InputError, match=f"--compare-to.*{message}"):
        sweep.main([*given, *SETTINGS])
    assert not any(tmp_path.iterdir())
