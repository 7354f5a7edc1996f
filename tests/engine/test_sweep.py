"""Series of runs: seeds, grids, recipes; cut off and gone on with."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import evaluate, sweep, train
from engine.runs.run import open_run
from engine.utils.errors import InputError

from ..conftest import REPOSITORY
from .conftest import TINY
from .in_process import workers_in_process
from .whole_runs import assert_same_run

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


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ('train=["sst"],["quora"]', ['["sst"]', '["quora"]']),
        ('train=["sst","sts"],["quora", "sst"]', ['["sst","sts"]', '["quora", "sst"]']),
        ("balancing.fixed={sst=1,sts=2},{sst=2}", ["{sst=1,sts=2}", "{sst=2}"]),
        ("train=['a,b'],\"c,d\",e", ["['a,b']", '"c,d"', "e"]),
        ("lr=1e-3, 2e-3", ["1e-3", "2e-3"]),
        ("data=[odd,{names", ["[odd", "{names"]),
    ],
)
def test_values_are_split_as_toml_is(axis, values):
    key = axis.partition("=")[0]
    assert sweep.grid_points([axis]) == [(f"{key}={value}",) for value in values]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tune", "lr=1e-3"], "--tune lr=1e-3: one value is no choice; give several, or this"),
        (["--tune", "lr=1e-3,1e-3"], "--tune lr=1e-3,1e-3: one value is no choice"),
        (["--tune", "lr"], "--tune lr: expected key=value,value,"),
        (["--tune", "lr=1,,2"], "--tune lr=1,,2: expected key=value,value,"),
        (["--tune", "lr=1,2", "--grid", "lr=3"], "--tune lr=1,2: lr is given already"),
        (["--tune", "lr=1,2", "lr=3,4"], "--tune lr=3,4: lr is given already"),
        (
            ["--tune", "lr=1,2", "--random", "2", "--draw", "lr=log:1:2"],
            "--tune lr=1,2: lr is given already",
        ),
        (
            ["--tune", "lr=1,2", "--halving", "--min-steps", "1", "--max-steps", "2"],
            "--tune: --halving keeps the best of all candidates",
        ),
        (["--tune", "best_of=sst,sts"], "which do not compare; put that key into --grid"),
        (
            ["--grid", "balance=sum,krum", "--set", 'train=["sst","sts"]', "epochs=1"],
            "balance krum: 2 tasks are too few",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_a_run(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        sweep.main(["demo", *options, "--out", str(tmp_path / "runs")])
    assert not any(tmp_path.iterdir())


def test_two_jobs_have_the_scores_of_one(tmp_path, capfd):
    grid = ["demo", "--grid", "balance=sum,pcgrad", "--seeds", "2"]
    settings = [*SETTINGS, "threads=1"]  # last digits depend on the number of threads
    for jobs in ("1", "2"):
        out = ["--out", str(tmp_path / jobs), "--jobs", jobs, "--prune"]
        assert sweep.main([*grid, *out, *settings]) == 0
    one, two = (json.loads((tmp_path / jobs / "results.json").read_text()) for jobs in "12")
    assert list(one) == list(two)
    assert [own["scores"] for own in one.values()] == [own["scores"] for own in two.values()]
    shown = capfd.readouterr().out.splitlines()
    assert "run 1 of 4: demo/balance=sum/seed-0" in shown
    score = one["demo/balance=sum/seed-1"]["scores"]["overall"]
    assert f"demo/balance=sum/seed-1: overall {score:.3f}" in shown
    assert any(
        line.startswith("run 4 of 4: demo/balance=pcgrad/seed-1, about 0:") for line in shown
    )
    # What each of two printed is in its folder, what one printed was shown.
    run = tmp_path / "2" / "demo/balance=sum/seed-0"
    assert "3 task gradients, balance sum, 2 steps" in (run / "output.log").read_text()
    assert sum("3 task gradients, balance sum, 2 steps" in line for line in shown) == 2
    assert not list((tmp_path / "1").rglob("output.log"))

    # Pruned: the scores stay, the weights are gone, and one line says so.
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["pruned.txt"]
    assert open_run(run).recipe.balance == "sum"
    assert {"metrics.jsonl", "evaluations.jsonl", "metrics.json"} <= set(os.listdir(run))
    for command in (
        lambda: evaluate.main([str(run)]),
        lambda: train.main(["demo", "--resume", "--out", str(run), *settings, "balance=sum"]),
    ):
        with pytest.raises(InputError, match=r"engine\.sweep --prune removed its checkpoints"):
            command()
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert sweep.main([*grid, "--out", str(tmp_path / "2"), "--prune", *settings]) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written


LONG = [*TINY, "threads=1", "epochs=1000", "checkpoint_every=1", "max_steps=150"]


def until(condition) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """The processes that train: a spawned one says so in its command line."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Begin a sweep in a session of its own; return when its runs have a checkpoint each."""
    line = ["demo", *options, "--out", str(folder), "--set", *LONG]
    process = subprocess.Popen(
        [sys.executable, "-m", "engine.sweep", *line],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    jobs = int(options[options.index("--jobs") + 1]) if "--jobs" in options else 1
    done = folder / "demo"
    before = set(done.glob("seed-*/checkpoints/step-*"))

    def begun() -> bool:
        new = set(done.glob("seed-*/checkpoints/step-*/manifest.json"))
        return len({path.parents[2] for path in new if path.parent not in before}) == jobs

    until(lambda: begun() or process.poll() is not None)
    return process


def test_killed_wherever_it_is_a_series_has_the_runs_of_one_that_is_not(tiny_run, tmp_path):
    """Its child, by Ctrl-C, and itself: then the same command goes on."""
    folder, options = tmp_path / "runs", ["--seeds", "2", "--jobs", "2"]
    ended = start(folder, *options)
    os.killpg(ended.pid, signal.SIGINT)
    shown, _ = ended.communicate(timeout=120)
    assert ended.returncode == 128 + signal.SIGINT
    assert shown.splitlines()[-1].startswith("stopped by SIGINT; the same command goes on")
    assert not (folder / "results.json").exists()

    killed = start(folder, *options)
    children = children_of(killed.pid)
    assert len(children) == 2
    killed.kill()
    killed.communicate()
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    assert not (folder / "results.json").exists()

    last = start(folder, *options)
    os.kill(min(children_of(last.pid)), signal.SIGKILL)
    shown, _ = last.communicate(timeout=240)
    assert last.returncode == 0
    lines = shown.splitlines()
    (line,) = [text for text in lines if text.startswith("tried again: ")]
    assert line.startswith("tried again: demo/seed-")
    assert line.endswith("(killed by SIGKILL)")
    assert list(scores_of(folder)) == ["demo/seed-0", "demo/seed-1"]
    settings = tuple(LONG[len(TINY) :])
    for seed in "01":
        tiny_run(f"whole-{seed}", "--seed", seed, settings=settings)
        assert_same_run(tmp_path / f"whole-{seed}", folder / "demo" / f"seed-{seed}")


def test_of_tuned_points_the_chosen_are_compared(tmp_path, capfd):
    grid = ["demo", "--grid", "balance=sum,pcgrad", "--tune", "lr=1e-3,1e-2", "--seeds", "2"]
    options = ["--out", str(tmp_path / "runs"), "--compare-to", "balance=sum"]
    assert sweep.main([*grid, *options, *SETTINGS]) == 0
    shown = capfd.readouterr().out
    assert "overall against balance=sum" in shown
    assert "(2 seeds)" in shown
    assert shown.count("baseline") == 1
    for wrong in ("lr=1e-3", "balance=mgda"):
        with pytest.raises(InputError, match=r"--compare-to.*no group"):
            sweep.main([*grid, "--out", str(tmp_path / "a"), "--compare-to", wrong, *SETTINGS])


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        (["--grid", "lr=1,2"], "lr=3"),
        (["--tune", "lr=1,2"], "lr=3"),
        (["--random", "2", "--draw", "lr=log:1:2"], "lr=3"),
        (["--grid", "lr=1,2", "--tune", "batch_size=8,16"], "batch_size=4"),
        (["--grid", "balance_granularity=layer,model"], "surgery=layer"),
    ],
)
def test_a_setting_that_every_point_replaces_is_refused(options, setting, tmp_path):
    for given in (["--set", setting], ["--set", "seed=1", "--set", "epochs=2", setting]):
        with pytest.raises(InputError, match=f"^--set {setting}: .*name each field once"):
            sweep.main(["demo", *options, "--out", str(tmp_path / "s"), *given])
    assert not (tmp_path / "s").exists()


def test_a_pruned_series_has_its_scores_again_without_results(tmp_path, monkeypatch):
    """All advise to remove a damaged ``results.json``: nothing may be lost by that."""
    monkeypatch.setattr(sweep, "workers_of", workers_in_process)
    line = ["demo", "--seeds", "2", "--prune", "--out", str(tmp_path)]
    assert sweep.main([*line, *SETTINGS]) == 0
    results = (tmp_path / "results.json").read_bytes()
    (tmp_path / "results.json").write_text('{"demo/seed-0": {')
    with pytest.raises(InputError, match=r"results\.json: not the results .* remove it") as error:
        sweep.main([*line, *SETTINGS])
    assert "\n" not in str(error.value)
    assert "pydantic" not in str(error.value)
    (tmp_path / "results.json").unlink()
    with pytest.raises(InputError, match=r"was made with lr = .* scores are of other settings"):
        sweep.main([*line, *SETTINGS, "lr=0.5"])
    assert sweep.main([*line, *SETTINGS]) == 0
    assert (tmp_path / "results.json").read_bytes() == results


def test_a_halving_uses_jobs_within_its_rungs(tmp_path, monkeypatch, capfd):
    halving = ["--halving", "--min-steps", "1", "--eta", "2", "--max-steps", "2", "--prune"]
    grid = ["demo", "--grid", "lr=1e-3,1e-2", *halving]
    for jobs in ("2", "1"):
        out = ["--out", str(tmp_path / jobs), "--jobs", jobs]
        assert sweep.main([*grid, *out, "--set", *TINY, "threads=1"]) == 0
        # In this process, the second time.
        monkeypatch.setattr(sweep, "workers_of", workers_in_process)
    for name in ("halving.json", "results.json"):
        one, two = (json.loads((tmp_path / jobs / name).read_text()) for jobs in "12")
        for results in (one, two):
            for result in results.values() if name == "results.json" else ():
                del result["seconds"]
        assert one == two
    shown = capfd.readouterr().out.splitlines()
    assert shown[:2] == [f"up to step 1 of 2: demo/lr={rate}/seed-0" for rate in LRS_OF_HALVING]
    # A candidate that was stopped may be trained on, so that it keeps its checkpoints.
    (winner,) = json.loads((tmp_path / "2/results.json").read_text())
    for rate in LRS_OF_HALVING:
        run = tmp_path / f"2/demo/lr={rate}/seed-0"
        left = [path.name for path in (run / "checkpoints").iterdir()]
        assert (left == ["pruned.txt"]) == (winner == f"demo/lr={rate}/seed-0")


LRS_OF_HALVING = ("1e-3", "1e-2")
