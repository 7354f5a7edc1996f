"""Count the CPUs that this process may use."""

import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of a container: microseconds, and in how many; or "max"."""


def usable_cpus() -> int:
    """Return how many logical CPUs this process may keep busy.

    Less than the machine has where it is bound to some, or where a container has a quota of time.
    """
    bound, limit = len(os.sched_getaffinity(0)), quota()
    return max(1, bound if limit is None else min(bound, limit))


def quota() -> int | None:
    """Return how many CPUs a container has time for; None where there is no limit."""
    try:
        time, period = QUOTA.read_text(encoding="ascii").split()
        return int(time) // int(period)
    except (OSError, ValueError):
        return None
