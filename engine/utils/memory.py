"""Find out how much memory this process may use."""

import os
from pathlib import Path

_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container: bytes, or "max"


def machine_memory() -> int:
    """Return how many bytes of memory the machine has, or a container's limit."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        return min(memory, int(_MEMORY_LIMIT.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no limit
        return memory
