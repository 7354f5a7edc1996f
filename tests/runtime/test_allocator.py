"""What a step frees is there for the next step, without the kernel's help."""

import ctypes
import os
import resource
import subprocess
import sys

import pytest

from ..conftest import REPOSITORY

# Page faults of what a step does: allocate much, free it all, and so on.  In a process of its own,
# since a process is set once.
ROUNDS, TENSORS, MEBIBYTES = 3, 16, 8
COUNT = f"""
import resource, torch
from engine.runtime.allocator import keep_freed_memory

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
