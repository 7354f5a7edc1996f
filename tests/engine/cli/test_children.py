"""Runs of a series in child processes: they die in many ways, and the series goes on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from engine.cli.children import Children
from engine.config import recipe as recipes
from engine.runs.experiments import RunSpec
from engine.runs.job import End, Job, Outcome
from engine.training.signals import StopRequest
from engine.utils.errors import InputError

from ...conftest import REPOSITORY

KILL = signal.SIGKILL
DONE = (Outcome.DONE, "")


def misbehave(job: Job) -> End:
    """End as the name of the run says, in a child process."""
    how = job.spec.group
    first = not (mark := job.series / f"{how}.begun").exists()
    mark.touch()
    if how == "killed" or (how == "killed once" and first):
        os.kill(os.getpid(), KILL)
    if how == "crashed once" and first:
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "left":
        sys.exit(0)
    if how == "defect":
        raise ValueError("no such\nthing")
    if how == "memory":
        raise MemoryError
    if how == "input":
        raise InputError("no such file")
    return End(Outcome.DONE, scores={"overall": 0.5})


def wait_for_a_signal(job: Job) -> End:
    """Train without end; write how it was stopped, after a while that a second signal would cut."""
    with StopRequest() as stop:
        (job.series / f"{job.spec.group}.begun").write_text(str(os.getpid()))
        while not stop:
            time.sleep(0.01)
        time.sleep(0.5)
    assert stop.signal is not None
    (job.series / f"{job.spec.group}.stopped").write_text(stop.signal.name)
    return End(Outcome.STOPPED, signal=stop.signal)


class Listed:
    """A schedule of runs by their names."""

    def __init__(self, folder: Path, *names: str) -> None:
        recipe = recipes.load("demo")
        self.left = [Job(RunSpec(name, recipe), folder) for name in names]
        self.ends: dict[str, tuple[Outcome, str]] = {}

    def next(self) -> Job | None:
        return self.left.pop(0) if self.left else None

    def add(self, job: Job, end: End) -> None:
        self.ends[job.spec.group] = (end.outcome, end.reason)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody waits for is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_runs_that_die_are_tried_again_once(tmp_path, capsys):
    console = Console(width=200, highlight=False)
    children = Children(misbehave, console, 3)
    names = ("fine", "killed once", "killed", "crashed once", "left", "defect", "memory", "input")
    schedule = Listed(tmp_path, *names)
    assert children.run(schedule) is None
    assert schedule.ends == {
        "fine": DONE,
        "killed once": DONE,
        "crashed once": DONE,
        "killed": (
            Outcome.DIED,
            "killed by SIGKILL, twice (as the system does when memory runs out)",
        ),
        "left": (Outcome.DIED, "ended with status 0, twice"),
        "defect": (Outcome.DIED, "ValueError: no such thing, twice"),
        "memory": (
            Outcome.OUT_OF_MEMORY,
            "out of memory: free some, or train fewer at once",
        ),
        "input": (Outcome.BAD_INPUT, "no such file"),
    }
    assert children.tried_again == {
        "killed once/seed-0": "killed by SIGKILL",
        "killed/seed-0": "killed by SIGKILL",
        "crashed once/seed-0": "killed by SIGSEGV",
        "left/seed-0": "ended with status 0",
        "defect/seed-0": "ValueError: no such thing",
    }
    shown = capsys.readouterr().out.splitlines()
    assert "killed once/seed-0: killed by SIGKILL; it is tried again" in shown


def test_at_the_deadline_children_stop_and_nothing_is_begun(tmp_path):
    schedule = Listed(tmp_path, "a", "b", "c")
    children = Children(wait_for_a_signal, Console(), 2)

    class Later(float):
        """A deadline that comes when both have begun."""

        def __le__(self, _now: float) -> bool:
            return len(list(tmp_path.glob("*.begun"))) == 2

    assert children.run(schedule, Later()) is None
    assert sorted(path.name for path in tmp_path.glob("*.stopped")) == ["a.stopped", "b.stopped"]
    assert not schedule.ends  # stopped runs are neither done nor failed
    assert not children.tried_again
    assert len(schedule.left) == 1


def test_a_child_that_another_asks_to_stop_is_tried_again(tmp_path):
    """As an early OOM killer does, which sends SIGTERM."""
    schedule = Listed(tmp_path, "a")

    children = Children(stop_once, Console())
    assert children.run(schedule) is None
    assert schedule.ends == {"a": DONE}
    assert children.tried_again == {"a/seed-0": "stopped by SIGTERM"}


def stop_once(job: Job) -> End:
    if not (mark := job.series / "begun").exists():
        mark.touch()
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return End(Outcome.STOPPED, signal=stop.signal)
    return End(Outcome.DONE)


PROGRAM = """
import signal, sys
from pathlib import Path
from rich.console import Console
from engine.cli.children import Children
from tests.engine.cli.test_children import Listed, wait_for_a_signal
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    found = Children(wait_for_a_signal, Console(), 2).run(Listed(Path(sys.argv[1]), "a", "b"))
    print(found.name)
"""


@pytest.fixture
def parent(tmp_path):
    """A process with two children that train, in a session of its own."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: len([p for p in tmp_path.glob("*.begun") if p.read_text()]) == 2)
        process.children = [int(path.read_text()) for path in tmp_path.glob("*.begun")]
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_group_stops_each_child_once(number, parent, tmp_path):
    """Ctrl-C and a closed window reach all processes of a group."""
    os.killpg(parent.pid, number)
    shown, _ = parent.communicate(timeout=120)
    assert (parent.returncode, shown) == (0, f"{number.name}\n")
    assert [path.read_text() for path in tmp_path.glob("*.stopped")] == ["SIGTERM"] * 2
    assert all(map(is_gone, parent.children))


def test_children_of_a_killed_parent_stop_with_a_checkpoint(parent, tmp_path):
    parent.kill()
    until(lambda: all(map(is_gone, parent.children)))
    assert [path.read_text() for path in tmp_path.glob("*.stopped")] == ["SIGTERM"] * 2


def test_asked_twice_nothing_is_waited_for(parent, tmp_path):
    for _ in range(2):
        os.kill(parent.pid, signal.SIGINT)
        time.sleep(0.1)
    parent.communicate(timeout=120)
    assert parent.returncode != 0
    assert all(map(is_gone, parent.children))
    assert not list(tmp_path.glob("*.stopped"))
