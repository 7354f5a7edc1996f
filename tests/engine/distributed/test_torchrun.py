"""Runs that torchrun starts: on several nodes, through a killed worker, and stopped by a signal."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.cli.common import DIVERGED
from engine.runs.run import open_run

from ...launch import on_two_machines
from ...robustness.kills import kill_runs
from ...robustness.outcome import outcome
from ..conftest import TINY
from ..disk import file_size_limit
from ..launch import launch, start
from ..training.test_divergence import wait_for

pytestmark = pytest.mark.long


def arguments(folder: Path, *settings: str) -> list[str]:
    return ["demo", "--out", str(folder), "--device", "cpu", "--set", *TINY, *settings]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two ranks without torchrun."""
    folder = tmp_path_factory.mktemp("two") / "run"
    launch(2, [arguments(folder)], folder.with_name("log"))
    return folder


def test_two_nodes_give_the_bits_of_two_ranks(whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    agents = on_two_machines(["-m", "engine.train", *arguments(run)], [log, log])
    assert [agent.wait(timeout=120) for agent in agents] == [0, 0], log.read_text()
    assert outcome(run) == outcome(whole)
    (line,) = (line for line in log.read_text().splitlines() if "each rank sends" in line)
    assert "2 ranks, sharded: each rank sends" in line
    assert "GB/s" in line
    assert "holds" in line


@pytest.mark.parametrize("way", ["torchrun", "two machines"])
def test_a_killed_worker_is_started_again_and_the_bits_stay(tmp_path, way):
    result = kill_runs(tmp_path, 1, seed=1, steps=8, ways=[way])
    assert result["kills"] == 1
    assert result["under_torchrun"] + result["on_two_machines"] == 1
    assert result["different"] == []


def started(folder: Path, log: Path, *settings: str) -> Sequence:
    """Start two ranks that would go on for hours; return their processes when steps are made."""
    processes = start(2, [arguments(folder, "epochs=10000", *settings)], log)
    metrics = folder / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, processes[0])
    return processes


def test_one_rank_that_is_asked_to_stop_stops_all_with_a_checkpoint(tmp_path):
    leader, other = started(tmp_path / "run", tmp_path / "log", "log_every=5")
    other.send_signal(signal.SIGTERM)
    assert [process.wait(timeout=60) for process in (leader, other)] == [128 + signal.SIGTERM] * 2
    found = open_run(tmp_path / "run").checkpoints
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert found.progress().step == len(lines)
    assert "stopped by SIGTERM; go on with --resume" in (tmp_path / "log").read_text()


def test_a_full_disk_of_one_rank_stops_all_in_one_line_each(tmp_path):
    leader, other = started(tmp_path / "run", tmp_path / "log")
    with file_size_limit(10_000, leader.pid):
        assert leader.wait(timeout=60) == 2
    assert other.wait(timeout=60) in (2, 75)  # 2 where it took part in the checkpoint that failed
    log = (tmp_path / "log").read_text()
    errors = [line for line in log.splitlines() if line.startswith("error:")]
    assert len(errors) == 2
    assert any("cannot write" in line and "file too large" in line for line in errors)


def test_a_loss_that_is_not_finite_is_skipped_by_all_ranks(tmp_path):
    """At such a rate nothing is finite after the first update; epochs are longer than that."""
    settings = (
        "lr=1e18",
        "schedule=constant",
        "warmup=0",
        "max_skipped=2",
        "max_train_examples=512",
    )
    processes = start(2, [arguments(tmp_path / "run", *settings)], tmp_path / "log")
    assert [process.wait(timeout=60) for process in processes] == [DIVERGED, DIVERGED]
    for rank in range(2):
        saved = json.loads((tmp_path / f"run/skipped-00000001-rank-{rank}.json").read_text())
        assert sum(len(examples) for examples in saved["tasks"].values()) == 48
