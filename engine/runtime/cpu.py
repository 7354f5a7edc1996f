"""Prepare a CPU for training: threads, few shapes."""

import _thread
import os
import threading

import torch

from .._kernels import kernels
from ..utils.cpus import quota
from ..utils.errors import InputError

_OTHER_THREADS = 8
"""Those that a run starts besides torch's: they load batches, write checkpoints, draw."""
_TO_BEGIN = 2.0
"""Seconds in which a thread begins, on a busy machine too."""


def token_multiple(dtype: torch.dtype) -> int:
    """Return what the tokens of a task in a batch should be a multiple of.

    Where oneDNN multiplies bf16, it compiles a product anew for every number of rows, in 0.4 ms,
    and keeps the code for good.  Batches of short sentences differ in every number, and multiples
    of 32 cost less than that: 120 steps of MiniLM-L6 were 4 % faster and took 1.3 GiB less.
    """
    by_onednn = kernels.backend("linear_task_gradients_", "cpu") == "torch"
    return 32 if dtype == torch.bfloat16 and by_onednn else 1


def available_cores() -> int:
    """Return how many physical cores this process may keep busy.

    Less than the machine has where it is bound to some, or where a container has a quota of time,
    which torch does not look at.
    """
    machine = torch.cpu.get_capabilities()
    physical, logical = machine["num_physical_cores"], machine["num_logical_cores"]
    cores: int = len(os.sched_getaffinity(0)) * physical // logical
    limit = quota()
    return max(1, cores if limit is None else min(cores, limit))


def share_cores(jobs: int) -> int:
    """Leave this process its share of the cores, where ``jobs`` runs are trained at once.

    Returns:
        The number of threads, which ``threads = 0`` means from now on; OMP_NUM_THREADS counts.
    """
    count = min(torch.get_num_threads(), max(1, available_cores() // jobs))
    torch.set_num_threads(count)
    return count


def set_threads(count: int, processes: int) -> int:
    """Set how many threads torch computes with.

    Args:
        count: of this process; 0 to share the cores among its machine's processes.  One process
            then has no more than torch would take by itself, so that OMP_NUM_THREADS counts; of
            several it does not, since ``torchrun`` sets it to 1.  Where fewer can be started, 0
            means those.
        processes: of this run, on this machine.

    Returns:
        The number of threads.

    Raises:
        InputError: there are fewer CPUs, or so many threads cannot be started.
    """
    cpus: int = torch.cpu.get_capabilities()["num_logical_cores"]
    if count > cpus:
        raise InputError(f"threads = {count}: this machine has {cpus} CPUs; lower it, or give 0")
    wanted = count
    if count == 0:
        wanted = max(1, available_cores() // processes)
        if processes == 1:
            wanted = min(wanted, torch.get_num_threads())
    # OpenMP crashes the process where it cannot start a thread.
    possible = _startable_threads(wanted + _OTHER_THREADS) - _OTHER_THREADS
    if count > max(1, possible):
        raise InputError(
            f"threads = {count}: the system lets this process start no more than "
            f"{max(1, possible)} (ulimit -u, pids.max of its cgroup); lower threads, or give 0"
        )
    wanted = max(1, min(wanted, possible))
    torch.set_num_threads(wanted)
    return wanted


def _startable_threads(count: int) -> int:
    """Return how many of ``count`` threads this process can have beside the one that asks."""
    release = threading.Event()
    begun, ended = threading.Semaphore(0), threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        release.wait()
        ended.release()

    started = 0
    try:
        while started < count:
            # threading.Thread would wait for good for one that had no memory to begin.
            _thread.start_new_thread(wait, ())
            if not begun.acquire(timeout=_TO_BEGIN):
                break
            started += 1
    except (RuntimeError, MemoryError):  # "can't start new thread"
        pass
    finally:
        release.set()
        for _ in range(started):
            ended.acquire(timeout=_TO_BEGIN)
    return started
