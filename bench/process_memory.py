"""Sample the memory of a process and of all that it started, from ``/proc``."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

_EVERY = 0.2
"""Seconds between samples: reading the pages of a gigabyte takes about 10 ms."""
_PROC = Path("/proc")


class Memory(NamedTuple):
    """Bytes of a process, or of several.

    Attributes:
        whole: resident bytes, of those that processes share the proportional part (PSS): pages of
            mapped files that were read are among them, which the system takes back at need.
        anonymous: those that belong to no file.
    """

    whole: int
    anonymous: int


class Watched(NamedTuple):
    """What a process took.

    Attributes:
        status: its exit status.
        seconds: until it ended.
        peak: the most of its own and its descendants' memory in one sample, each of both.
        main: the most resident bytes of the process itself, as the kernel counted them (VmHWM).
            ``ru_maxrss`` would have those of the process that started it, too.
        processes: the most of them in one sample.
    """

    status: int
    seconds: float
    peak: Memory
    main: int
    processes: int


def descendants(process: int, parents: Mapping[int, int]) -> list[int]:
    """Return a process and all that it started, directly or not.

    Args:
        process: its id.
        parents: of each process the one that started it.
    """
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def memory_of(processes: Iterable[int]) -> Memory:
    """Return the memory of processes; those that have ended, or end now, have none."""
    whole = anonymous = 0
    for process in processes:
        try:
            text = (_PROC / str(process) / "smaps_rollup").read_text(encoding="ascii")
        except (FileNotFoundError, ProcessLookupError):
            continue
        whole += _bytes("Pss", text)
        anonymous += _bytes("Pss_Anon", text)
    return Memory(whole, anonymous)


def watch(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    is_done: Callable[[], bool],
) -> Watched:
    """Run a command to its end, and sample its memory until ``is_done``.

    Args:
        command: to run.
        environment: variables that it has beside those of this process.
        log: takes what it prints.
        is_done: says, after each sample, that no more are taken.
    """
    peak, main, count, done = Memory(0, 0), 0, 0, False
    start = time.perf_counter()
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                if not done:
                    running = descendants(process.pid, _parents())
                    now = memory_of(running)
                    peak = Memory(*map(max, peak, now))
                    main = max(main, _highest(process.pid))
                    count = max(count, len(running))
                    done = is_done()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_EVERY)
        finally:
            process.kill()
            process.wait()
    return Watched(process.returncode, time.perf_counter() - start, peak, main, count)


def _parents() -> dict[int, int]:
    """Return of each process the one that started it."""
    parents = {}
    for path in _PROC.iterdir():
        if not path.name.isdecimal():
            continue
        try:
            stat = (path / "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        # The name, in brackets, may hold spaces and brackets.
        parents[int(path.name)] = int(stat.rpartition(")")[2].split()[1])
    return parents


def _highest(process: int) -> int:
    try:
        text = (_PROC / str(process) / "status").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return _bytes("VmHWM", text)


def _bytes(field: str, text: str) -> int:
    """Return a field's value; a process that is about to end has none."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
