"""A small part of the fault report."""

from pathlib import Path

import pytest

from .__main__ import CASES
from .base import Base
from .fuzz import fuzz
from .kills import kill_runs

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


def test_spoilt_inputs_are_refused_or_read(tmp_path):
    result = fuzz(tmp_path, 400, seed=1)
    assert result["unhandled"] == []
    assert all("refused" in counts or "read" in counts for counts in result["by_kind"].values())


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    result = kill_runs(tmp_path, 1, seed=3, ranks=1, steps=6)
    assert result["different"] == []
