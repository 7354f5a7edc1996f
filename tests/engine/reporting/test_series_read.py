"""What is read from the folders of a series: courses of gradients, scores, settings."""

import itertools
import json
import shutil

import numpy as np
import pytest

from engine import sweep
from engine.reporting.series_read import collect, course_of, sum_cosine
from engine.reporting.series_record import PARTS
from engine.runtime.precision import pick_device

from .made_series import PAIRS, TASKS, scores_of, step_line, write_run, write_series


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


METRICS = ("accuracy", "accuracy", "pearson")


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


def test_a_setting_with_a_slash_is_read_back(tmp_path):
    folder = tmp_path / "a"
    group = sweep._group_of("demo", ("description=50%/x", "betas=[0.9,0.99]"))
    assert "%2F" in group
    write_run(folder / group / "seed-0", "demo", ["description=50%/x"], 0, [])
    result = {"group": group, "scores": scores_of([0.5] * 3), "seconds": 1.0}
    (folder / "results.json").write_text(json.dumps({f"{group}/seed-0": result}))
    (record,) = collect([folder], pick_device("cpu"))
    assert record.runs[0].point == ("description=50%/x", "betas=[0.9,0.99]")
