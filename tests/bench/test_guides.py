"""Comparison of the runs of a sweep with the plain sum."""

import math
import statistics
from typing import Any

import pytest

from bench import guides
from engine.config import recipe as recipes


def run(setting: str, seed: int, score: float, conflict: float | None = 0.5) -> dict[str, Any]:
    test = {"nli": score, "overall": score}
    return {"setting": setting, "seed": seed, "test": test, "conflict_rate": conflict}


def test_differences_are_taken_seed_by_seed() -> None:
    sums, others = (0.5, 0.7, 0.6), (0.51, 0.73, 0.62)
    runs = [run("sum", seed, score) for seed, score in enumerate(sums)]
    # In another order, with a seed that the sum lacks.
    runs += [run("pcgrad", seed, others[seed]) for seed in (2, 0, 1)] + [run("pcgrad", 7, 0.9)]
    runs += [run("nli alone", 0, 0.4, None)]
    found = guides.compare(runs)
    assert found["pcgrad"]["seeds"] == [0, 1, 2, 7]
    assert found["pcgrad"]["scores"]["nli"]["mean"] == pytest.approx(
        statistics.mean([*others, 0.9])
    )
    assert found["pcgrad"]["scores"].keys() == {"nli"}  # the overall score is of the tasks trained
    difference = found["pcgrad"]["against_sum"]["nli"]
    assert difference["values"] == pytest.approx([0.02, 0.01, 0.03])
    assert difference["mean"] == pytest.approx(0.02)
    # Student's t of two degrees of freedom at 97.5 %, from a table.
    assert difference["half_width"] == pytest.approx(4.302653 * 0.01 / math.sqrt(3))
    assert found["sum"]["against_sum"] == {}
    assert found["nli alone"]["against_sum"] == {}  # one seed has no interval
    assert found["nli alone"]["conflict_rate"] is None


def test_without_the_sum_there_is_no_difference() -> None:
    found = guides.compare([run("pcgrad", seed, 0.5) for seed in range(3)])
    assert found["pcgrad"]["against_sum"] == {}
    assert found["pcgrad"]["scores"]["nli"]["deviation"] == 0


def test_settings_are_told_apart() -> None:
    weighed = recipes.load("demo", ["balance=sum", "tasks.sts.weight=2"])
    assert guides.setting_of(weighed) == "sum, sts x 2"
    assert guides.setting_of(recipes.load("demo")) == "pcgrad"
    assert guides.setting_of(recipes.load("demo", ["train=['sts']"])) == "sts alone"
