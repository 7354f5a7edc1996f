"""Threads are as many as there are cores."""

import _thread
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runtime import cpu
from engine.utils import cpus
from engine.utils.errors import InputError

from ...conftest import REPOSITORY


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sixteen cores of two threads each, and the file of a container's quota."""
    cores = {"num_physical_cores": 16, "num_logical_cores": 32}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cores)
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _pid: set(range(32)))
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(cpus, "QUOTA", quota)
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


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("count", [33, 100_000, 1_000_000, 2**31 - 1])
def test_more_threads_than_cpus_are_one_line(count: int) -> None:
    before = torch.get_num_threads()
    with pytest.raises(InputError, match=f"threads = {count}: this machine has 32 CPUs; lower it"):
        cpu.set_threads(count, 1)
    assert torch.get_num_threads() == before


def _raise(*_: object) -> None:
    raise RuntimeError("can't start new thread")


def _never_begins(*_: object) -> None:
    """As a thread that lacks memory for its first call."""


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("fail", [_raise, _never_begins])
def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, fail: Callable) -> None:
    """As under ulimit -u or in a cgroup of few processes, where OpenMP crashes the process."""
    start, alive = _thread.start_new_thread, []

    def start_some(*arguments: Any) -> None:
        if len(alive) == 8 + 3:
            return fail()
        alive.append(None)
        return start(*arguments)

    monkeypatch.setattr(_thread, "start_new_thread", start_some)
    monkeypatch.setattr(cpu, "_TO_BEGIN", 0.1)
    with pytest.raises(InputError, match=r"threads = 20: .* no more than 3 \(ulimit -u"):
        cpu.set_threads(20, 1)
    alive.clear()
    assert cpu.set_threads(3, 1) == torch.get_num_threads() == 3
    for processes in (2, 1):
        alive.clear()
        assert cpu.set_threads(0, processes) == torch.get_num_threads() == 3
    monkeypatch.setattr(_thread, "start_new_thread", fail)
    assert cpu.set_threads(0, 2) == 1


def words_printed(code: str, environment: dict[str, str]) -> list[str]:
    """Run code in a process of its own."""
    command = [sys.executable, "-c", code]
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    )
    return run.stdout.split()


def test_a_huge_number_in_the_environment_is_no_number_of_threads() -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1000000"}
    code = (
        "import torch; from engine.runtime.cpu import available_cores, set_threads;"
        "assert set_threads(0, 1) <= available_cores(); print((torch.ones(99, 99) @ "
        "torch.ones(99, 99)).sum().item())"
    )
    assert words_printed(code, environment) == ["970299.0"]


@pytest.mark.parametrize(("backend", "multiple"), [("torch", 32), ("cpp", 1)])
def test_batches_are_filled_up_for_onednn_alone(
    monkeypatch: pytest.MonkeyPatch, backend: str, multiple: int
) -> None:
    monkeypatch.setattr(cpu.kernels, "backend", lambda *_: backend)
    assert cpu.token_multiple(torch.bfloat16) == multiple
    assert cpu.token_multiple(torch.float32) == 1


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages here"
)
@pytest.mark.parametrize("asked", [None, "0"])
def test_large_tensors_ask_for_huge_pages(asked: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    if asked is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = asked
    # Every command imports these before its first tensor.  "hg" is what madvise leaves.
    code = (
        "import engine.train, torch; x = torch.ones(32 << 20);"
        "print(any(line.startswith('VmFlags') and 'hg' in line.split() "
        "for line in open('/proc/self/smaps')))"
    )
    assert words_printed(code, environment) == [str(asked is None)]
