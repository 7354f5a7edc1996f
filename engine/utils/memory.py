"""Find out how much memory this process may use, and uses."""

import os
import resource
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container: bytes, or "max"
_PROCESS = Path("/proc/self")
_KIB = 1 << 10
_PEAK_TO_RESIDENT = "5"
"""What ``clear_refs`` is told to let the peak begin at what is resident now (proc(5))."""


def machine_memory() -> int:
    """Return how many bytes of memory the machine has, or a container's limit."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_MEMORY_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no limit
        return memory


class Resident(NamedTuple):
    """Bytes of this process that are in memory.

    Attributes:
        own: of its own: heap, stacks, shared memory.
        of_files: pages of files: code and mapped data.
    """

    own: int
    of_files: int


def resident_memory() -> Resident:
    """Return how many bytes of this process are in memory."""
    lines = (_PROCESS / "status").read_text(encoding="utf-8").splitlines()
    kib = {key: value for key, _, value in (line.partition(":") for line in lines)}
    sizes = {key: int(kib[key].split()[0]) * _KIB for key in ("RssAnon", "RssShmem", "RssFile")}
    return Resident(sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"])


def peak_resident_memory() -> int:
    """Return the most bytes of this process that were in memory at one time.

    Counted since the process began, or since :func:`restart_peak`.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB


def restart_peak() -> None:
    """Let the peak begin anew, where the system allows it: some containers do not."""
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text(_PEAK_TO_RESIDENT, encoding="ascii")


def resident_of_files(files: Collection[Path]) -> int:
    """Return how many bytes of memory-mapped files this process has in memory.

    The system drops them where memory is short, and reads them again.
    """
    names, size, counts = {str(file) for file in files}, 0, False
    with (_PROCESS / "smaps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            key, _, rest = line.partition(" ")
            if not key.endswith(":"):  # a mapping: addresses, rights, offset, device, inode, file
                counts = rest.split(maxsplit=4)[-1].strip() in names
            elif counts and key == "Rss:":
                size += int(rest.split()[0]) * _KIB
    return size
