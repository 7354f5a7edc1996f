"""The report on a series: every figure from runs whose statistics are known, files that hold it."""

import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from scipy import stats

from engine import report, sweep
from engine.reporting import series_conflict, series_forest
from engine.reporting.series_conflict import near_bounds, spread_out
from engine.reporting.series_forest import near_limit
from engine.reporting.series_groups import labels, make_study
from engine.reporting.series_read import collect, course_of, sum_cosine
from engine.reporting.series_record import PARTS, read_records
from engine.runtime.precision import pick_device
from engine.utils.errors import InputError

from ..conftest import TINY
from .made_series import PAIRS, TASKS, scores_of, step_line, write_run, write_series

EFFECTS = {"sum": 0.0, "pcgrad": 0.05, "cagrad": 0.001}
NOISE = np.random.default_rng(3).normal(0, 0.004, (3, 4, 3))


def of_point(point, seed) -> dict[str, float]:
    method = list(EFFECTS).index(point["balance"])
    values = 0.5 + EFFECTS[point["balance"]] + 0.02 * seed + NOISE[method, seed]
    return scores_of(values.tolist())


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "methods"
    return write_series(folder, ["balance=sum,pcgrad,cagrad"], 4, of_point)


def run(*arguments: object) -> None:
    assert report.main(["--series", *map(str, arguments), "--device", "cpu"]) == 0


def rows_of(text: str, title: str = "# Runs of") -> list[list[str]]:
    """The cells of the first table below a title, without its head."""
    table = text.partition(title)[2].partition("\n| ")[2].partition("\n\n")[0]
    lines = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def test_the_tables_have_the_statistics_of_the_runs(series, tmp_path):
    run(series, "--compare-to", "balance=sum", "--out", tmp_path)
    text = (tmp_path / "series.md").read_text()
    assert "12 runs of 3 groups, ordered by overall (mean)" in text
    rows = rows_of(text)
    assert [row[1] for row in rows] == ["pcgrad", "cagrad", "sum"]
    scores = {
        method: [of_point({"balance": method}, seed) for seed in range(4)] for method in EFFECTS
    }
    table = np.array([[one["overall"] for one in scores[method]] for method in EFFECTS])
    residuals = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    (record,) = read_records(tmp_path / "series.json")
    half = stats.t.ppf(1 - 0.05 / 4, 6) * np.sqrt((residuals**2).sum() / 6 * 2 / 4)
    for row in rows:
        method = row[1]
        assert row[2] == "4"
        for cell, score in zip(row[3:7], (*TASKS, "overall"), strict=True):
            values = [one[score] for one in scores[method]]
            assert cell == f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
        assert row[-1] == f"{61.5 / 60:.1f}"
        turned = [one.sum_cosine for one in record.runs if one.point == (f"balance={method}",)]
        assert row[-2] == f"{np.mean(turned):.3f} ± {np.std(turned, ddof=1):.3f}"
        if method == "sum":
            assert row[7] == "baseline"
            continue
        pairs = table[list(EFFECTS).index(method)] - table[0]
        low, high = pairs.mean() - half, pairs.mean() + half
        mean = f"**{pairs.mean():+.3f}**" if method == "pcgrad" else f"{pairs.mean():+z.3f}"
        assert row[7] == f"{mean} [{low:+z.3f}, {high:+z.3f}]"
        (own,) = [cells for cells in rows_of(text, "### overall") if cells[0] == method]
        assert own[1] == f"{pairs.mean():+.3f} ± {pairs.std(ddof=1):.3f} (4 seeds)"
        alone = stats.t.interval(0.95, 3, pairs.mean(), stats.sem(pairs))
        assert own[2].strip("*") == f"[{alone[0]:+z.3f}, {alone[1]:+z.3f}]"
    assert "2 comparisons; residuals of 3 groups and 4 seeds" in text
    assert "6 degrees of freedom" in text
    assert "one seed" not in text
    for name in ("differences.png", "conflict.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_without_a_baseline_there_are_no_differences(series, tmp_path):
    run(series, "--out", tmp_path)
    assert "ifference" not in (tmp_path / "series.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {
        "series.json",
        "series.md",
        "conflict.png",
    }


def test_series_json_alone_gives_the_same_report(series, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(series, "--compare-to", "balance=sum", "--out", first)
    run(first / "series.json", "--compare-to", "balance=sum", "--out", second)
    assert len(list(first.iterdir())) == 4
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name
    assert str(series.parent) not in (first / "series.json").read_text()


def test_the_cosine_with_the_sum_is_that_of_the_gradients():
    rng = np.random.default_rng(5)
    rows, given = rng.normal(size=(3, 7)) * [[1.0], [1e-4], [30.0]], np.array([0.2, 3.0, 1.0])
    norms = np.linalg.norm(rows, axis=1)
    pairs = itertools.combinations(enumerate(TASKS), 2)
    line = {
        "weights": dict(zip(TASKS, given.tolist(), strict=True)),
        "task_grad_norms": dict(zip(TASKS, norms.tolist(), strict=True)),
        "cosines": {
            f"{a}/{b}": float(rows[i] @ rows[j] / norms[i] / norms[j]) for (i, a), (j, b) in pairs
        },
    }
    update, plain = given @ rows, rows.sum(0)
    expected = update @ plain / np.linalg.norm(update) / np.linalg.norm(plain)
    assert sum_cosine(line) == pytest.approx(expected, rel=1e-12)
    zero = dict.fromkeys(TASKS, 0.0)
    assert sum_cosine(line | {"weights": zero}) is None
    assert sum_cosine(line | {"task_grad_norms": zero}) is None
    assert sum_cosine(line | {"weights": zero | {TASKS[0]: None}}) is None
    alone = {key: {TASKS[0]: table[TASKS[0]]} for key, table in line.items() if key != "cosines"}
    assert sum_cosine(alone | {"cosines": {}}) is None
    assert sum_cosine(line | {"cosines": {}}) is None
    course = course_of([line | {"step": 0, "conflict_rate": 0.5}], one_group=False)
    assert course is not None
    assert course.sum_cosine == [None] * PARTS


def test_the_course_has_the_means_of_equal_parts(tmp_path):
    cosines = [dict(zip(PAIRS, (step - 45.0, 1.0, -step), strict=True)) for step in range(100)]
    found = course_of([step_line(step, own) for step, own in enumerate(cosines)])
    assert found.first_step == 0
    np.testing.assert_allclose(found.cosines["sst/quora"], 5 * np.arange(PARTS) + 2 - 45)
    np.testing.assert_allclose(
        found.conflict_rate,
        [1 / 3 + 1 / 3 * (step < 9) - 1 / 15 * (step == 0) for step in range(20)],
        rtol=1e-5,
    )
    assert found.weights["sts"] == [3.0] * PARTS
    assert found.task_grad_norms["quora"] == [4.0] * PARTS

    few = course_of([step_line(step, own) for step, own in enumerate(cosines[:3])])
    assert few.cosines["sst/quora"] == [-45.0] * 7 + [-44.0] * 7 + [-43.0] * 6
    assert course_of([]) is None


def test_a_step_of_one_task_has_no_conflict_rate():
    """The log says 0, which is no agreement of tasks."""
    alone, two = step_line(0, {}), step_line(1, {"sst/sts": -1.0})
    assert course_of([alone]).conflict_rate == [None] * PARTS
    assert course_of([alone] * 20 + [two] * 20).conflict_rate == [None] * 10 + [1.0] * 10


def test_what_a_run_did_not_measure_is_null():
    lines = [step_line(step, {"sst/sts": 0.5}) for step in range(PARTS)]
    lines[3]["cosines"]["sst/sts"] = lines[4]["conflict_rate"] = None
    found = course_of(lines)
    assert found.cosines["sst/sts"][2:5] == [0.5, None, 0.5]
    assert found.conflict_rate[3:6] == [0.0, None, 0.0]


def test_all_pieces_of_a_log_count(series, tmp_path):
    folder = shutil.copytree(series, tmp_path / "methods")
    log = folder / "demo/balance=sum/seed-1/metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    (log.parent / "metrics-00000000.jsonl").write_text("".join(lines[:25]))
    log.write_text("".join(lines[25:]))
    device = pick_device("cpu")
    assert collect([folder], device) == collect([series], device)
    (log.parent / "metrics-00000000.jsonl").unlink()  # keep_logs
    (record,) = collect([folder], device)
    (own,) = [run for run in record.runs if run.name == "demo/balance=sum/seed-1"]
    assert (own.course.first_step, own.steps) == (25, 40)


def test_scores_of_tasks_that_a_run_does_not_train_are_left_out(tmp_path):
    folder = write_series(
        tmp_path / "a", ['train=["sst"]', "best_of=sst"], 1, lambda *_: scores_of([0.5, 0.1, 0.2])
    )
    (record,) = collect([folder], pick_device("cpu"))
    assert record.runs[0].scores == {"sst": 0.5}
    assert record.runs[0].decision == 0.5
    assert record.runs[0].point == ('train=["sst"]', "best_of=sst")


def test_pairs_go_across_folders(series, tmp_path):
    alone = write_series(
        tmp_path / "alone",
        ['train=["sst"]', "best_of=sst"],
        2,
        lambda _, seed: scores_of([0.7 + 0.1 * seed, 0, 0]),
    )
    run(alone, series, "--compare-to", "balance=sum", "--out", tmp_path / "out")
    text = (tmp_path / "out/series.md").read_text()
    assert "ranked" not in text
    pairs = [0.7 + 0.1 * s - of_point({"balance": "sum"}, s)["sst"] for s in (0, 1)]
    (row,) = [cells for cells in rows_of(text, "### sst") if cells[0].startswith("train")]
    assert row[1] == f"{np.mean(pairs):+.3f} ± {np.std(pairs, ddof=1):.3f} (2 seeds)"
    assert row[3]  # of two seeds, by the layout of the others
    assert not [cells for cells in rows_of(text, "### quora") if cells[0].startswith("train")]
    # Of both folders the recipe is called demo.
    assert {row[0] for row in rows_of(text)} == {"methods/demo", "alone/demo"}


def lr_series(folder: Path) -> Path:
    """Three learning rates of two methods; further seeds of those that a sweep would keep."""

    def scores(point, seed):
        if (seed > 0 and point["lr"] != "0.2") or (point["lr"], point["balance"]) == ("0.3", "sum"):
            return None
        best = {"0.1": 0.4, "0.2": 0.6, "0.3": 0.5}[point["lr"]]
        return scores_of([best + 0.01 * seed + 0.1 * (point["balance"] == "pcgrad")] * 3)

    return write_series(folder, ["balance=sum,pcgrad", "lr=0.1,0.2,0.3"], 3, scores)


def test_of_tuned_settings_the_best_at_the_first_seed_is_shown(tmp_path):
    folder = lr_series(tmp_path / "tuned")
    run(folder, "--tuned", "lr", "--compare-to", "balance=sum", "--out", tmp_path / "out")
    text = (tmp_path / "out/series.md").read_text()
    assert [row[1:4] for row in rows_of(text)] == [["pcgrad", "0.2", "3"], ["sum", "0.2", "3"]]
    assert rows_of(text, "## Candidates") == [
        ["sum", "0.400", "**0.600**", ""],
        ["pcgrad", "0.500", "**0.700**", "0.600"],
    ]
    assert "demo/balance=sum,lr=0.3/seed-0, after 40 steps" in text
    run(folder, "--compare-to", "balance=sum,lr=0.1", "--out", tmp_path / "all")
    assert len(rows_of((tmp_path / "all/series.md").read_text())) == 5
    with pytest.raises(InputError, match="several groups have these settings"):
        run(folder, "--compare-to", "balance=sum", "--out", tmp_path / "none")
    with pytest.raises(InputError, match=r"--tuned rl: no group is told by it"):
        run(folder, "--tuned", "rl", "--out", tmp_path / "none")


def test_less_is_better_where_an_error_decides(tmp_path):
    settings = ["best_of=sts", "tasks.sts.metrics=['mse']"]

    def scores(point, seed):
        return {"sst": 0.5, "quora": 0.5, "sts": float(point["lr"]) + seed, "overall": 0.1}

    folder = write_series(tmp_path / "a", [*settings, "lr=0.1,0.2"], 1, scores)
    records = collect([folder], pick_device("cpu"))
    assert [g.point[-1] for g in make_study(records).groups] == ["lr=0.1", "lr=0.2"]
    assert [g.point[-1] for g in make_study(records, tuned=["lr"]).groups] == ["lr=0.1"]


def test_runs_without_a_result_are_named(series, tmp_path):
    folder = shutil.copytree(series, tmp_path / "methods")
    results = json.loads((folder / "results.json").read_text())
    del results["demo/balance=pcgrad/seed-2"]
    for seed in range(4):
        del results[f"demo/balance=cagrad/seed-{seed}"]
    (folder / "results.json").write_text(json.dumps(results))
    log = folder / "demo/balance=pcgrad/seed-2/metrics.jsonl"
    lines = log.read_text().replace('"skipped": 0', '"skipped": 1').splitlines(keepends=True)
    log.write_text("".join(lines[:7]))
    run(folder, "--compare-to", "balance=sum", "--out", tmp_path / "out")
    text = (tmp_path / "out/series.md").read_text()
    missing = text.partition("## No result")[2].partition("## ")[0]
    assert missing.count("- methods: demo/") == 5
    skipped = "seed-2, after 7 steps, the last of them skipped, since gradients were not finite"
    assert f"- methods: demo/balance=pcgrad/{skipped}" in missing
    assert "(3 seeds)" in rows_of(text, "### overall")[0][1]
    assert "(3 of 4 seeds)" not in text  # no layout, so no simultaneous interval
    assert "No intervals together" in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (None, "metrics.jsonl is missing or has no step"),
        ("", "metrics.jsonl is missing or has no step"),
        ('{"step": 0}\n{"step": 1}\n', r"metrics.jsonl:1: not a line of metrics"),
    ],
)
def test_a_damaged_log_is_one_line(series, tmp_path, capsys, damage, said):
    folder = shutil.copytree(series, tmp_path / "methods")
    log = folder / "demo/balance=sum/seed-1/metrics.jsonl"
    log.unlink()
    if damage is not None:
        log.write_text(damage)
    run(folder, "--compare-to", "balance=sum", "--out", tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: methods: demo/balance=sum/seed-1: {said}")
    assert str(tmp_path) not in line
    text = (tmp_path / "out/series.md").read_text()
    assert "methods: demo/balance=sum/seed-1: metrics.jsonl" in text.partition("Without steps")[2]
    assert "(4 seeds)" in rows_of(text, "### overall")[0][1]  # its scores count all the same


def test_no_log_at_all_gives_no_picture_of_conflict(series, tmp_path, capsys):
    folder = shutil.copytree(series, tmp_path / "m", ignore=shutil.ignore_patterns("*.jsonl"))
    run(folder, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"series.json", "series.md"}
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "no conflict.png: no log has a step of two tasks"


def test_a_baseline_that_shares_no_seed_gives_no_picture_of_differences(tmp_path, capsys):
    def scores(point, seed):
        return scores_of([0.5] * 3) if (point["lr"] == "0.1") == (seed == 0) else None

    folder = write_series(tmp_path / "a", ["lr=0.1,0.2"], 2, scores)
    run(folder, "--compare-to", "lr=0.1", "--out", tmp_path / "out")
    assert not (tmp_path / "out/differences.png").exists()
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        "runs without a result: 2, named in series.md",
        "no differences.png: no group shares a seed and a score with its baseline",
    ]
    rows = rows_of((tmp_path / "out/series.md").read_text())
    assert sorted(row[-4] for row in rows) == ["baseline", "no common seed"]


def test_what_no_report_can_be_made_from(series, tmp_path):
    def refused(*arguments: object) -> str:
        with pytest.raises(InputError) as error:
            report.main([*map(str, arguments), "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
        return str(error.value)

    assert "holds no results.json" in refused("--series", tmp_path)
    (tmp_path / "empty.json").write_text("[]")
    assert "none of these has a run" in refused("--series", tmp_path / "empty.json")
    assert "no effect without --series" in refused(series, "--compare-to", "balance=sum")
    assert "no effect without --series" in refused(series, "--tuned", "lr")
    for none in (",", " , "):
        assert "--tuned" in refused("--series", series, "--tuned", none)
    assert "either it or --papers" in refused("--series", series, "--papers")
    assert "--data: has no effect" in refused("--series", series, "--data", tmp_path)
    assert "no group has these" in refused("--series", series, "--compare-to", "balance=mgda")
    folder = shutil.copytree(series, tmp_path / "methods")
    (folder / "demo/balance=sum/seed-1/recipe.toml").unlink()
    assert "recipe.toml: is missing, so that the settings" in refused("--series", folder)


def test_a_kept_series_grows(series, tmp_path):
    """What a later place says of a run counts; a run that is finished now is no longer missing."""
    part = shutil.copytree(series, tmp_path / "one/methods")
    results = json.loads((part / "results.json").read_text())
    kept = {name: one for name, one in results.items() if "seed-0" in name or "sum" in name}
    (part / "results.json").write_text(json.dumps(kept))
    run(part, "--out", tmp_path / "kept")
    (before,) = read_records(tmp_path / "kept/series.json")
    assert (len(before.runs), len(before.unfinished)) == (6, 6)
    shutil.copy(tmp_path / "kept/series.json", tmp_path / "before.json")
    run(tmp_path / "kept/series.json", series, "--out", tmp_path / "kept", "--force")
    (after,) = read_records(tmp_path / "kept/series.json")
    (whole,) = collect([series], pick_device("cpu"))
    assert {run.name: run for run in after.runs} == {run.name: run for run in whole.runs}
    assert after.unfinished == []
    # The other way round the old record takes nothing away.
    run(series, tmp_path / "before.json", "--out", tmp_path / "again")
    (again,) = read_records(tmp_path / "again/series.json")
    assert (len(again.runs), again.unfinished) == (12, [])


def test_runs_of_two_machines_are_told_apart(series, tmp_path):
    run(series, "--out", tmp_path / "kept")
    content = json.loads((tmp_path / "kept/series.json").read_text())
    content[0]["runs"] = [one for one in content[0]["runs"] if one["seed"] == 0]
    for one in content[0]["runs"]:
        one["read_with"]["device"] = "Other CPU"
    (tmp_path / "other.json").write_text(json.dumps(content))
    run(series, tmp_path / "other.json", "--out", tmp_path / "out")
    (joined,) = read_records(tmp_path / "out/series.json")
    others = {one.seed for one in joined.runs if one.read_with.device == "Other CPU"}
    own = {one.seed for one in joined.runs} - others
    assert others == {0}
    assert own == {1, 2, 3}
    text = (tmp_path / "out/series.md").read_text().partition("## Read with")[2]
    counts = re.findall(r"methods, (\d+) runs: .*?, ([^,]+), where", text)
    assert {count: device == "Other CPU" for count, device in counts} == {"9": False, "3": True}


def change(content: list, path: str, value: object) -> list:
    *tables, last = path.split(".")
    place = content[0]
    for key in tables:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(
            ("name", "a\x1b[2J"),
            ("runs", {}),
            ("other", 1),
            ("runs.0.read_with", {}),
            ("runs.0.seed", -1),
        ),
        *(("runs.0.scores", {"sst": None}), ("runs.0.scores", {"sst": "x"}), ("runs.0.sign", 2)),
        *(
            ("runs.0.course.conflict_rate", [0.5]),
            ("runs.0.point", "lr"),
            ("runs.0.steps", 1 << 40),
        ),
        *(("runs.1.name", "demo/balance=sum/seed-0"), ("runs.1.seed", 0), ("runs.0.seconds", None)),
        *(("runs.0.seconds", -1.0), ("runs.0.point", ["lr"]), ("runs.0.point", [" =1"])),
        *(("runs.0.scores", {"sst": 1e200}), ("runs.0.scores", {"sst": -1.7e308})),
        ("runs.0.decision", 1e101),
    ],
)
def test_a_corrupted_series_json_is_refused_in_one_line(series, tmp_path, path, value):
    run(series, "--out", tmp_path / "good")
    content = json.loads((tmp_path / "good/series.json").read_text())
    (tmp_path / "series.json").write_text(json.dumps(change(content, path, value)))
    with pytest.raises(InputError, match="not the record of a series") as error:
        report.main(["--series", str(tmp_path / "series.json"), "--out", str(tmp_path / "out")])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("content", ["", "[", "{}", "null", "[1]", "\0", "[" * 9999])
def test_what_is_no_series_json(tmp_path, content):
    (tmp_path / "series.json").write_text(content)
    with pytest.raises(InputError, match="not the record of a series"):
        report.main(["--series", str(tmp_path / "series.json"), "--out", str(tmp_path / "out")])


def test_names_that_mean_something_to_markdown_or_matplotlib(series, tmp_path):
    run(series, "--out", tmp_path / "good")
    content = json.loads((tmp_path / "good/series.json").read_text())
    bad = "balance=| <b> $x^2$ _a_ [l](h) `c` \u4f60"
    for one in content[0]["runs"]:
        one["point"] = [bad] if "pcgrad" in one["group"] else one["point"]
        one["scores"] = {"_$s": one["scores"]["sst"], **one["scores"]}
        one["course"]["cosines"] = {"_$p/_q": one["course"]["cosines"]["sst/sts"]}
    (tmp_path / "series.json").write_text(json.dumps(content))
    run(tmp_path / "series.json", "--compare-to", "balance=sum", "--out", tmp_path / "out")
    text = (tmp_path / "out/series.md").read_text()
    assert r"\| &lt;b\> \$x^2\$ \_a\_ \[l\](h) \`c\` 你 |" in text
    assert len(rows_of(text)) == 3


def test_folders_are_told_apart_by_their_own_settings_where_a_name_is_cut_off(tmp_path):
    """A group's name of more than 200 bytes ends with a hash."""
    axes = [f"tasks.{task}.metrics=['{name}']" for task, name in zip(TASKS, METRICS, strict=True)]
    long = "description=" + "x" * 150
    folder = tmp_path / "long"
    results = {}
    for lr in ("0.1", "0.2"):
        point = (long, *axes, f"lr={lr}")
        group = sweep._group_of("demo", point)
        write_run(folder / group / "seed-0", "demo", point, 0, [])
        scores = scores_of([0.5, 0.5, float(lr)])
        results[f"{group}/seed-0"] = {"group": group, "scores": scores, "seconds": 1.0}
    (folder / "results.json").write_text(json.dumps(results))
    (record,) = collect([folder], pick_device("cpu"))
    assert [run.point for run in record.runs] == [("lr=0.1",), ("lr=0.2",)]


METRICS = ("accuracy", "accuracy", "pearson")


def test_a_setting_with_a_slash_is_read_back(tmp_path):
    folder = tmp_path / "a"
    group = sweep._group_of("demo", ("description=50%/x", "betas=[0.9,0.99]"))
    assert "%2F" in group
    write_run(folder / group / "seed-0", "demo", ["description=50%/x"], 0, [])
    result = {"group": group, "scores": scores_of([0.5] * 3), "seconds": 1.0}
    (folder / "results.json").write_text(json.dumps({f"{group}/seed-0": result}))
    (record,) = collect([folder], pick_device("cpu"))
    assert record.runs[0].point == ("description=50%/x", "betas=[0.9,0.99]")


def test_names_are_as_short_as_they_can_be(series, tmp_path):
    records = collect([series], pick_device("cpu"))
    assert sorted(labels(make_study(records).groups).values()) == ["cagrad", "pcgrad", "sum"]
    other = write_series(
        tmp_path / "other", ["balance=sum,mgda"], 1, lambda *_: scores_of([0.5] * 3)
    )
    both = make_study(collect([series, other], pick_device("cpu")))
    assert sorted(labels(both.groups).values()) == [
        *("cagrad", "methods sum", "mgda", "other sum", "pcgrad")
    ]


def test_groups_without_settings_leave_the_names_of_others_short(series, tmp_path):
    def write(name: str, axes: list[str]) -> Path:
        return write_series(tmp_path / name, axes, 1, lambda *_: scores_of([0.5] * 3))

    layers = write("layers", ["balance=pcgrad", "balance_granularity=layer,tensor"])
    alone = [write(name, []) for name in ("alone", "tuned")]
    study = make_study(collect([series, layers, *alone], pick_device("cpu")))
    assert sorted(labels(study.groups).values()) == [
        *("alone", "cagrad", "pcgrad"),
        *(f"pcgrad, balance_granularity={value}" for value in ("layer", "tensor")),
        *("sum", "tuned"),
    ]


def test_thirty_groups_have_names_that_do_not_overlap(tmp_path, monkeypatch):
    values = ",".join(f"{0.1 + number / 1000:g}" for number in range(30))
    folder = write_series(
        tmp_path / "a",
        [f"lr={values}"],
        2,
        lambda point, seed: scores_of(
            [0.1 if point["lr"] == "0.1" else 0.5 + float(point["lr"]) / 9] * 3
        ),
    )
    figures = []
    for module in (series_conflict, series_forest):
        monkeypatch.setattr(module, "png", lambda figure: figures.append(figure) or b"")
    study = make_study(collect([folder], pick_device("cpu")), "lr=0.11")
    series_conflict.conflict(study)
    series_forest.differences(study)
    scatter, forest = figures
    for figure, texts in (
        (scatter, scatter.axes[0].texts),
        (forest, forest.axes[0].get_yticklabels()),
    ):
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in texts]  # without the line to a point
        assert len(boxes) >= 29
        heights = sorted((box.y0, box.y1) for box in boxes)
        for (_, top), (bottom, _) in itertools.pairwise(heights):
            assert bottom > top - 2.5  # of the line's own space above and below
    (far,) = [text for text in scatter.axes[0].texts if text.get_text() == "0.1  0.100"]
    assert far is not None


def test_only_what_lies_outside_is_an_arrow(tmp_path, monkeypatch):
    """Intervals set the scale, not the many differences of one seed, which have none."""
    methods = ["sum", "pcgrad", "cagrad", "mgda", "upgrad", "gradvac", "imtl_g", "nash_mtl", "krum"]

    def of_some_seeds(point, seed):
        number = methods.index(point["balance"])
        if seed and number > 2:
            return None
        values = 0.5 + 1e-4 * number - 0.4 * (number == 8) + NOISE[number % 3 * (number < 3), seed]
        return scores_of(values.tolist())

    folder = write_series(tmp_path / "a", [f"balance={','.join(methods)}"], 4, of_some_seeds)
    figures = []
    monkeypatch.setattr(series_forest, "png", lambda figure: figures.append(figure) or b"")
    series_forest.differences(make_study(collect([folder], pick_device("cpu")), "balance=sum"))
    for axes in figures[0].axes:
        (arrow,) = axes.texts
        (line,) = [one for one in axes.lines if one.get_marker() == "<"]
        assert float(arrow.get_text()) < line.get_xdata()[0] < -0.005


def test_differences_of_zero_do_not_set_the_scale(tmp_path, monkeypatch):
    shift = 2.0**-10  # exact, so that the mean difference is 0

    def scores(point, seed):
        return scores_of([0.5 + (shift if seed else -shift) * (point["balance"] == "mgda")] * 3)

    folder = write_series(tmp_path / "a", ["balance=sum,mgda"], 2, scores)
    figures = []
    monkeypatch.setattr(series_forest, "png", lambda figure: figures.append(figure) or b"")
    series_forest.differences(make_study(collect([folder], pick_device("cpu")), "balance=sum"))
    for axes in figures[0].axes:
        (interval,) = [line for line in axes.lines if len(line.get_xdata()) == 2][1:]
        assert interval.get_xdata()[1] <= axes.get_xlim()[1] < 2 * interval.get_xdata()[1]


def test_places_are_spread_out():
    assert spread_out([0.5], 0.1) == [0.5]
    assert spread_out([], 0.1) == []
    np.testing.assert_allclose(spread_out([0.2, 0.9, 0.5], 0.1), [0.2, 0.9, 0.5])
    np.testing.assert_allclose(spread_out([0.5, 0.5, 0.5], 0.1), [0.5, 0.6, 0.7])
    np.testing.assert_allclose(spread_out([1.0, 1.0, 0.0], 0.25), [0.75, 1.0, 0.0])
    np.testing.assert_allclose(spread_out([0.3] * 5, 0.5), [0, 0.25, 0.5, 0.75, 1])


def test_what_is_far_from_most_does_not_set_the_scale():
    assert near_limit([1, 2, 3, 100]) == 3
    assert near_limit([]) == near_limit([0.0, 0.0]) == 1.0
    assert near_bounds([0.5, 0.51, 0.52, 0.1]) == (0.5, 0.52)
    assert near_bounds([0.5]) == (0.5, 0.5)


def test_pictures_of_an_earlier_report_are_named(series, tmp_path, capsys):
    """They would be taken for those of the new table."""
    run(series, "--compare-to", "balance=sum", "--out", tmp_path)
    before = (tmp_path / "differences.png").read_bytes()
    assert "earlier report" not in capsys.readouterr().out
    run(series, "--out", tmp_path, "--force")
    shown = capsys.readouterr().out
    assert f"left {tmp_path}/differences.png, of an earlier report" in shown
    assert shown.count("earlier report") == 1
    assert (tmp_path / "differences.png").read_bytes() == before


def test_a_real_sweep(tmp_path, cache, capsys):
    arguments = ["demo", "--grid", "balance=sum,pcgrad", "lr=1e-3,1e-2", "--seeds", "2"]
    settings = ["--max-steps", "4", "--set", *TINY]
    assert sweep.main([*arguments, "--out", str(tmp_path / "runs"), *settings]) == 0
    options = ["--tuned", "lr", "--compare-to", "balance=sum", "--out", tmp_path / "out"]
    run(tmp_path / "runs", *options)
    (record,) = read_records(tmp_path / "out/series.json")
    results = json.loads((tmp_path / "runs/results.json").read_text())
    assert {one.name: one.scores for one in record.runs} == {
        name: result["scores"] for name, result in results.items()
    }
    assert {(one.steps, one.seed, one.precision) for one in record.runs} == {
        (4, 0, "fp32"),
        (4, 1, "fp32"),
    }
    for one in record.runs:
        lines = (tmp_path / "runs" / one.name / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line)["conflict_rate"] for line in lines]
        assert one.conflict_rate == pytest.approx(np.mean(rates), rel=1e-5)
        assert one.course.conflict_rate[::5] == pytest.approx(rates, rel=1e-5)
    text = (tmp_path / "out/series.md").read_text()
    assert "4 runs of 2 groups" in text
    best = max(
        ("1e-3", "1e-2"),
        key=lambda lr: results[f"demo/balance=pcgrad,lr={lr}/seed-0"]["scores"]["overall"],
    )
    (row,) = [row for row in rows_of(text) if row[1] == "pcgrad"]
    assert row[2] == best
