"""The report on a series: every figure from runs whose statistics are known."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from engine import report, sweep
from engine.reporting.series_groups import make_study
from engine.reporting.series_read import collect
from engine.reporting.series_record import read_records
from engine.runtime.precision import pick_device
from engine.utils.errors import InputError

from ..conftest import TINY
from .made_series import EFFECTS, TASKS, of_point, rows_of, run, scores_of, write_series


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
