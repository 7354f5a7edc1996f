"""Train the runs of a series in child processes, several at once.

The memory of a run is given back when its process ends, and one that dies does not end the others.
A child has a session of its own, so that Ctrl-C reaches this process alone, which asks its children
to stop; when this process is killed, they see a pipe close and stop by themselves, each with a
checkpoint.
"""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from rich.console import Console

from ..runs.folder import OUTPUT
from ..runs.job import End, Job, Outcome, Schedule
from ..runtime.oom import is_out_of_memory
from ..training.signals import StopRequest
from ..utils.errors import InputError
from .standard_output import guard_output

Task = Callable[[Job], End]
"""Trains one run; it is found by its name in the child, as pickle does."""

_TICK = 0.2
"""Seconds after which signals and the time are looked at."""


class Children:
    """Train the runs of a series, each in a child process.

    Args:
        task: trains one.
        console: to say on what is tried again.
        jobs: how many at once.
    """

    def __init__(self, task: Task, console: Console, jobs: int = 1) -> None:
        self._task, self._console = task, console
        self.jobs = jobs
        self.tried_again = dict[str, str]()

    def run(self, schedule: Schedule, deadline: float = math.inf) -> signal.Signals | None:
        """Train what a schedule holds; at the deadline stop with checkpoints.

        A run that dies is tried again once.
        """
        running = list[_Child]()
        with StopRequest() as stop:
            try:
                while True:
                    stopping = bool(stop) or time.monotonic() >= deadline
                    if not stopping:
                        self._fill(running, schedule)
                    if not running:
                        return stop.signal
                    if stopping:
                        for child in running:
                            child.stop()
                    for child in _ended(running):
                        running.remove(child)
                        end = child.end()
                        stopping = bool(stop) or time.monotonic() >= deadline
                        if stopping and end.outcome in (Outcome.DIED, Outcome.STOPPED):
                            continue
                        if (again := self._again(child.job, end)) is not None:
                            running.append(again)
                        else:
                            schedule.add(child.job, _with_hint(child.job, end))
            except KeyboardInterrupt:  # asked twice: not even a checkpoint is waited for
                for child in running:
                    child.process.kill()
                raise
            finally:
                for child in running:
                    child.stop()
                for child in running:
                    child.process.join()

    def _fill(self, running: "list[_Child]", schedule: Schedule) -> None:
        while len(running) < self.jobs and (job := schedule.next()) is not None:
            running.append(self._start(job))

    def _start(self, job: Job) -> "_Child":
        self._console.file.flush()  # the child prints to the same place
        context = multiprocessing.get_context("spawn")
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(self._task, job, sending))
        process.start()
        sending.close()
        return _Child(job, process, receiving)

    def _again(self, job: Job, end: End) -> "_Child | None":
        """Begin a run again that died for the first time."""
        name = job.spec.name
        if end.outcome not in (Outcome.DIED, Outcome.STOPPED) or name in self.tried_again:
            return None
        self.tried_again[name] = end.reason
        self._console.print(
            f"{name}: {end.reason}; it is tried again", soft_wrap=True, highlight=False
        )
        return self._start(job)


@dataclass(slots=True, eq=False)
class _Child:
    """A child process, its job, and what its end comes from."""

    job: Job
    process: SpawnProcess
    receiving: Connection
    asked: bool = False
    """Whether it was asked to stop; asked again, it would not wait for its checkpoint."""

    def stop(self) -> None:
        """Ask it to stop with a checkpoint, once."""
        if not self.asked:
            self.asked = True
            self.process.terminate()

    def end(self) -> End:
        """Return how it ended."""
        self.process.join()
        try:
            found = self.receiving.recv() if self.receiving.poll() else None
        except (EOFError, OSError):
            found = None
        self.receiving.close()
        if isinstance(found, End):
            return found
        code = self.process.exitcode or 0
        how = f"killed by {_name(-code)}" if code < 0 else f"ended with status {code}"
        return End(Outcome.DIED, how)


def _ended(running: list[_Child]) -> list[_Child]:
    """Return the children that have ended, after a moment at most."""
    found = wait([child.process.sentinel for child in running], _TICK)
    return [child for child in running if child.process.sentinel in found]


def _with_hint(job: Job, end: End) -> End:
    """Say of a run that died twice what to look at."""
    if end.outcome not in (Outcome.DIED, Outcome.STOPPED):
        return end
    reason = f"{end.reason}, twice"
    if _name(signal.SIGKILL) in end.reason:
        reason += " (as the system does when memory runs out)"
    if job.logged:
        reason += f"; {job.folder / OUTPUT} has what it printed"
    return end._replace(outcome=Outcome.DIED, reason=reason)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a signal of real time
        return f"signal {number}"


def _work(task: Task, job: Job, sending: Connection) -> None:
    """Train one run in this process, and send how it ended."""
    os.setsid()
    guard_output()
    threading.Thread(target=_stop_with_parent, name="parent", daemon=True).start()
    end = _end_of(task, job)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with suppress(OSError):  # nobody is there any more
        sending.send(end)


def _end_of(task: Task, job: Job) -> End:
    try:
        end = task(job)
    except InputError as error:
        return End(Outcome.BAD_INPUT, str(error))
    except KeyboardInterrupt:
        return End(Outcome.STOPPED, _by(signal.SIGINT), signal=signal.SIGINT)
    except Exception as error:
        if is_out_of_memory(error):
            return End(Outcome.OUT_OF_MEMORY, "out of memory: free some, or train fewer at once")
        traceback.print_exc()
        said = " ".join(str(error).splitlines())
        return End(Outcome.DIED, f"{type(error).__name__}: {said}")
    if end.outcome is Outcome.STOPPED and end.signal is not None:
        return end._replace(reason=_by(end.signal))
    return end


def _by(number: signal.Signals) -> str:
    return f"stopped by {number.name}"


def _stop_with_parent() -> None:
    """Stop this process with a checkpoint once its parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this is a child"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
