"""What a step frees is there for the next step, without the kernel's help."""

import ctypes
import subprocess
import sys

import pytest

from ..conftest import REPOSITORY

# Page faults of ten more tensors of 8 MiB, each freed before the next; a process of its own, since
# a process is set once.
_COUNT = """
import resource, torch
from engine.runtime.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def touch(times):
    for _ in range(times):
        torch.ones(2 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = touch(2)
print(touch(10) - before)
"""


def faults(*, keep: bool) -> int:
    command = [sys.executable, "-c", _COUNT.format(keep=keep)]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    pages = 10 * (8 << 20) // 4096
    assert faults(keep=False) > pages / 2  # or the test shows nothing
    assert faults(keep=True) < pages / 100
