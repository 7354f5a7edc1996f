"""The benchmark of ranks: what it finds is what the tests of surgery on ranks say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import distributed, plot

from ..conftest import REPOSITORY


def test_loops_agree_with_one_process_and_are_drawn(tmp_path: Path) -> None:
    """Two ranks; the loop that passes over the wrapper is the one whose ranks drift apart."""
    path = tmp_path / "distributed.json"
    options = ["--ranks", "2", "--rounds", "2", "--batch-size", "2", "--json", str(path)]
    command = [sys.executable, "-m", "bench.distributed", *options]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    found = record["results"]["2 ranks"]
    names = {f"{wrapper}: {loop}" for wrapper, loop in distributed.contestants(2)}
    assert names < found.keys()
    for name in names:
        drifts = "published" in name
        assert (found[name]["between_ranks"] > 0.01) == drifts
        assert (found[name]["from_one_process"] > 0.01) == drifts
        assert (found[name]["bytes"][0] < 1e4) == drifts
    assert plot.draw(record).startswith(b"\x89PNG")


@pytest.mark.parametrize("ranks", [2, 4])
def test_replicas_of_shards_need_four_ranks(ranks: int) -> None:
    wrappers = {wrapper for wrapper, _ in distributed.contestants(ranks)}
    assert ("HSDP, 2 replicas" in wrappers) == (ranks == 4)
