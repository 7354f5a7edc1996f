"""Memory that a step frees is there for the next one."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import freed_memory

from ..conftest import REPOSITORY

# Page faults of what a step does: allocate much, free it all, and so on.  In a process of its own,
# since a process is set once.
ROUNDS, TENSORS, MEBIBYTES = 3, 16, 8
COUNT = f"""
import resource, torch
from kernels import keep_freed_memory

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
    # What glibc begins with, but fixed: whether it adapts is a matter of luck.  Small pages, which
    # fault one by one.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}
    environment["THP_MEM_ALLOC_ENABLE"] = "0"
    run = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept() -> None:
    pages = ROUNDS * TENSORS * (MEBIBYTES << 20) // resource.getpagesize()
    assert faults(keep=False) > pages / 2  # or the test shows nothing
    assert faults(keep=True) < pages / 100


ANOTHER = """
#include <stddef.h>
void *__libc_malloc(size_t);
void *malloc(size_t size) { return __libc_malloc(size); }
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_another_allocator_is_not_set(tmp_path: Path) -> None:
    source, library = tmp_path / "another.c", tmp_path / "another.so"
    source.write_text(ANOTHER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    run = subprocess.run(
        [sys.executable, "-c", "from kernels import keep_freed_memory; print(keep_freed_memory())"],
        cwd=REPOSITORY,
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == ["False"]


def test_a_system_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not freed_memory.keep_freed_memory()
