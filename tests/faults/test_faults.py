"""A small part of the fault report."""

from .fuzz import fuzz
from .kills import kill_runs


def test_spoilt_inputs_are_refused_or_read(tmp_path):
    result = fuzz(tmp_path, 400, seed=1)
    assert result["unhandled"] == []
    assert all("refused" in counts or "read" in counts for counts in result["by_kind"].values())


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    result = kill_runs(tmp_path, 1, seed=3, ranks=1, steps=6)
    assert result["different"] == []
