"""``kill -9`` at random moments of a run on some ranks, which must end with the same bits.

Killed runs are started again in three ways, in turn: by a new command with ``--resume``, and by
torchrun's agents of one machine or of two, which do so by themselves (``--max-restarts``).
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..engine.launch import start
from ..launch import on_two_machines, torchrun
from .outcome import outcome
from .progress import say

WAYS = ("resume", "torchrun", "two machines")

_SETTINGS = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=2", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256", "max_train_examples=320"),
    *("checkpoint_every=2", "log_every=1", "timeout=30"),
]


def kill_runs(
    folder: Path,
    kills: int,
    seed: int,
    *,
    ranks: int = 2,
    steps: int = 40,
    ways: Sequence[str] = WAYS,
) -> dict[str, Any]:
    """Kill processes ``kills`` times, in as many runs as it takes, and compare their ends.

    Args:
        folder: for the runs.
        kills: at least so many.
        seed: decides their moments and victims.
        ranks: processes of a run.
        steps: of a run.
        ways: in which killed runs are started again, in turn.

    Returns:
        ``kills``, and how many of them in each way but the first, and before the first checkpoint;
        ``runs``; and ``different``: the runs whose weights, moments or metrics are not those of the
        undisturbed run to the bit.
    """
    draw = random.Random(seed)
    begun = time.monotonic()
    _finish(_begin(folder / "whole", ranks, steps))
    duration = time.monotonic() - begun
    expected = outcome(folder / "whole")
    shutil.rmtree(folder / "whole")
    counts = {"kills": 0, "under_torchrun": 0, "on_two_machines": 0}
    counts |= {"before_the_first_checkpoint": 0, "runs": 0}
    different = []
    while counts["kills"] < kills:
        run = folder / f"run-{counts['runs']}"
        say(f"kills: {counts['kills']} of {kills}, {run.name}")
        way = ways[counts["runs"] % len(ways)]
        go = _kill_and_resume if way == "resume" else partial(_kill_under_torchrun, way)
        for saved in go(run, ranks, steps, kills - counts["kills"], Moments(run, duration, draw)):
            counts["kills"] += 1
            counts["under_torchrun"] += way == "torchrun"
            counts["on_two_machines"] += way == "two machines"
            counts["before_the_first_checkpoint"] += not saved
        if outcome(run) != expected:
            different.append(run.name)
            say(f"kills: {run.name} ended otherwise")
        shutil.rmtree(run)
        counts["runs"] += 1
    return counts | {"different": different}


class Moments:
    """Moments at which to kill: half of them anywhere in a run, half while steps are taken.

    Args:
        folder: the run's.
        duration: seconds of an undisturbed run.
        draw: decides all.
    """

    def __init__(self, folder: Path, duration: float, draw: random.Random) -> None:
        self._folder, self._duration, self.draw = folder, duration, draw

    def wait(self, ended: Callable[[], bool]) -> bool:
        """Wait for the next one; return False if the run ended before."""
        metrics = self._folder / "metrics.jsonl"
        in_training = self.draw.random() < 0.5
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        end = time.monotonic() + self.draw.uniform(0, self._duration)
        while time.monotonic() < end:
            if ended():
                return False
            if in_training and metrics.exists() and metrics.stat().st_mtime_ns > before:
                in_training, end = False, time.monotonic() + self.draw.uniform(0, 1)
            elif in_training:
                end = time.monotonic() + 1
            time.sleep(0.01)
        return not ended()

    @property
    def saved(self) -> bool:
        """Whether the run has a checkpoint."""
        return any((self._folder / "checkpoints").glob("step-*"))


def _kill_and_resume(run: Path, ranks: int, steps: int, kills: int, moments: Moments) -> list[bool]:
    """Kill one rank or all, wait for the others to give up, and resume, until the run is done.

    Returns:
        For each kill whether the run had a checkpoint by then.
    """
    killed: list[bool] = []
    while len(killed) < kills:
        processes = _begin(run, ranks, steps)
        if not moments.wait(partial(_ended, processes)):
            _finish(processes)
            return killed
        victims = moments.draw.choice([processes[:1], processes[1:], processes])
        for process in victims:
            process.send_signal(signal.SIGKILL)
        statuses = [process.wait(timeout=60) for process in processes]
        if -signal.SIGKILL in statuses:  # not just done
            killed.append(moments.saved)
    _finish(_begin(run, ranks, steps))
    return killed


def _kill_under_torchrun(
    way: str, run: Path, ranks: int, steps: int, kills: int, moments: Moments
) -> list[bool]:
    """Kill workers of torchrun's agents, which start all of them again.

    Returns:
        As :func:`_kill_and_resume`.
    """
    killed: list[bool] = []
    log = run.with_name("log")
    train = ["-m", "engine.train", *_arguments(run, steps)]
    if way == "two machines":
        agents = on_two_machines(train, [log, log], kills + 1)
    else:
        options = ["--standalone", f"--nproc-per-node={ranks}", f"--max-restarts={kills + 1}"]
        agents = [torchrun([*options, *train], log)]
    seen: set[int] = set()
    while len(killed) < kills and moments.wait(partial(_ended, agents)):
        workers = [
            worker for agent in agents for worker in children(agent.pid) if worker not in seen
        ]
        if len(workers) < ranks:  # the agents are still at it
            continue
        seen.update(workers)
        victims = moments.draw.choice([workers[:1], workers[1:], workers])
        there = [_kill(worker) for worker in victims]
        if any(there):
            killed.append(moments.saved)
    statuses = [agent.wait(timeout=300) for agent in agents]
    assert statuses == [0] * len(agents), log.read_text()[-5000:]
    return killed


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, in the order of their numbers."""
    found: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended
            found.update(map(int, file.read_text().split()))
    return sorted(found)


def _kill(pid: int) -> bool:
    """Kill a worker; return whether it was still there."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def _begin(folder: Path, ranks: int, steps: int) -> list[subprocess.Popen[bytes]]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return start(ranks, [[*_arguments(folder, steps), "--resume"]], folder.with_name("log"))


def _arguments(folder: Path, steps: int) -> list[str]:
    options = ["--out", str(folder), "--device", "cpu", "--max-steps", str(steps)]
    return ["demo", *options, "--set", *_SETTINGS]


def _ended(processes: list[subprocess.Popen[bytes]]) -> bool:
    return all(process.poll() is not None for process in processes)


def _finish(processes: list[subprocess.Popen[bytes]]) -> None:
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
