"""Memory that a step frees is there for the next one; threads are as many as there are cores."""

import ctypes
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine.runtime import cpu

from ..conftest import REPOSITORY

# Page faults of what a step does: allocate much, free it all, and so on.  In a process of its own,
# since a process is set once.
ROUNDS, TENSORS, MEBIBYTES = 3, 16, 8
COUNT = f"""
import resource, torch
from engine.runtime.cpu import keep_freed_memory

def faults(rounds):
    for _ in range(rounds):
        held = [torch.ones({MEBIBYTES} << 18) for _ in range({TENSORS})]
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if KEEP:
    assert keep_freed_memory()
before = faults(10)  # blocks find their places within a few rounds
print(faults({ROUNDS}) - before)
"""


def faults(*, keep: bool) -> int:
    command = [sys.executable, "-c", COUNT.replace("KEEP", str(keep))]
    # What glibc begins with, but fixed: whether it adapts is a matter of luck.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    pages = ROUNDS * TENSORS * (MEBIBYTES << 20) // resource.getpagesize()
    assert faults(keep=False) > pages / 2  # or the test shows nothing
    assert faults(keep=True) < pages / 100


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sixteen cores of two threads each, and the file of a container's quota."""
    cores = {"num_physical_cores": 16, "num_logical_cores": 32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cores)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _pid: set(range(32)))
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cpu, "_QUOTA", quota)
    before = torch.get_num_threads()
    yield quota
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quota", "cores"),
    [(None, 16), ("max 100000", 16), ("800000 100000", 8), ("50000 100000", 1), ("nonsense", 16)],
)
def test_cores_within_a_quota(machine: Path, quota: str | None, cores: int) -> None:
    if quota is not None:
        machine.write_text(quota)
    assert cpu.available_cores() == cores


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("processes", "threads"), [(2, 8), (5, 3), (40, 1)])
def test_ranks_share_the_cores(processes: int, threads: int) -> None:
    assert cpu.set_threads(0, processes) == torch.get_num_threads() == threads


@pytest.mark.usefixtures("machine")
def test_one_process_leaves_room_that_it_was_told_to_leave() -> None:
    torch.set_num_threads(3)  # as OMP_NUM_THREADS=3 does
    assert cpu.set_threads(0, 1) == torch.get_num_threads() == 3


@pytest.mark.usefixtures("machine")
def test_a_given_number_counts() -> None:
    assert cpu.set_threads(5, 4) == torch.get_num_threads() == 5
