"""A small part of the fault report."""

import os
import time
from pathlib import Path

import pytest

from engine import train

from .__main__ import CASES
from .base import Base
from .checks import changes, outcome_of, problems_of_end, snapshot
from .children import call, command
from .fuzz import fuzz
from .kills import kill_runs
from .loops import check_loops
from .settings import tables_around

FEW = {
    "outputs": 10,
    "sequences": 2,
    "settings": 10,
    "options": 5,
    "concurrent": 1,
    "files": 6,
    "operators": 6,
}
"""Cases of each part; the report has hundreds."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.make(tmp_path_factory.mktemp("faults") / "base")


@pytest.mark.parametrize("part", CASES)
def test_no_case_has_a_problem(base: Base, tmp_path: Path, part: str) -> None:
    attempt, *_ = CASES[part]
    result = attempt(base, tmp_path, FEW[part], 1, None)
    assert result["problems"] == []
    assert sum(result["outcomes"].values()) == FEW[part]


@pytest.mark.parametrize("table", ["tasks", "objectives"])
def test_a_recipe_can_be_trained_before_one_of_its_fields_is_corrupted(
    base: Base, tmp_path: Path, table: str
) -> None:
    around = tables_around((table, "a field"))
    ended = call(command(train, base.training(tmp_path / "run", *around)), tmp_path)
    assert ended.status == 0, ended.error


def test_what_ends_a_child_is_told(tmp_path: Path) -> None:
    limits = {os.abort: 60.0, _fail: 60.0, _sleep: 0.5}
    ends = [call(work, tmp_path, seconds=limit) for work, limit in limits.items()]
    assert [outcome_of(end) for end in ends] == ["crashed", "status 1", "hung"]
    assert "SIGABRT" in next(problems_of_end(ends[0]))


def _fail() -> None:
    raise ValueError


def _sleep() -> None:
    time.sleep(100)


def test_a_changed_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    before = snapshot(tmp_path)
    assert list(changes(before, snapshot(tmp_path), [], None)) == []
    (tmp_path / "b").write_text("a")
    (tmp_path / "b").replace(tmp_path / "a")
    assert list(changes(before, snapshot(tmp_path), [], None)) == ["changed a (inode)"]
    (tmp_path / "c").mkdir()
    assert list(changes(before, snapshot(tmp_path), ["a"], "d")) == ["left c"]
    assert list(changes(before, snapshot(tmp_path), ["a"], "c")) == []


def test_corrupted_inputs_are_refused_or_read(tmp_path):
    result = fuzz(tmp_path, 400, seed=1)
    assert result["unhandled"] == []
    assert all("refused" in counts or "read" in counts for counts in result["by_kind"].values())


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    result = kill_runs(tmp_path, 1, seed=3, ranks=1, steps=6)
    assert result["different"] == []


def test_a_lost_rank_ends_a_loop_on_one_machine_and_on_two(tmp_path):
    result = check_loops(tmp_path, 1, ["ddp"], ["killed"])
    assert result["problems"] == []
    assert all(case["said"] for name, case in result["cases"].items() if "killed" in name)
