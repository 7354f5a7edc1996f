"""Work in a forked process of its own, which may crash, hang or ask for too much memory."""

import contextlib
import faulthandler
import os
import random
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from huggingface_hub import constants

from engine.cli.common import run_cli

Work = Callable[[], object]
Prepare = Callable[[], object]

ROOM = 4 << 30
"""Bytes of address space that a child may ask for beyond what its parent has."""
_LEAST_ROOM = 22
"""A power of two.  Below, Python may wait for good for a thread that had no memory to begin."""
_OUTPUT = 1 << 25
"""Bytes of what a child printed that are looked at."""
FLUSH_FAILED = 120
"""Python's own exit status when stdout cannot be written to at the end."""


class Ended(NamedTuple):
    """How a child ended.

    Attributes:
        status: exit status, negative for a signal as in :mod:`subprocess`; None where it was
            still at it when its time was over.
        out: what it printed.
        error: what it printed on stderr.
    """

    status: int | None
    out: str
    error: str

    @property
    def crash(self) -> str:
        """What ended it, if no exit did."""
        if self.status is None:
            return "still at it when its time was over"
        return f"died of {signal.Signals(-self.status).name}" if self.status < 0 else ""

    @property
    def last_line(self) -> str:
        """The last line on stderr."""
        return self.error.rstrip().rpartition("\n")[2]


class Child:
    """A forked process, begun at once.

    Args:
        work: what it does; a ``SystemExit`` is its status.
        scratch: the folder for what it prints.
        prepare: called in the child before, with everything in place.
        room: bytes of address space that it may ask for beyond what its parent has.
    """

    def __init__(
        self, work: Work, scratch: Path, prepare: Prepare | None = None, room: int = ROOM
    ) -> None:
        self._files = [scratch / "stdout", scratch / "stderr"]
        for file in self._files:
            file.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # Python warns of threads, which no child needs
            warnings.simplefilter("ignore")
            self.pid = os.fork()
        if self.pid == 0:
            _be_a_child(work, self._files, prepare, room)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the child, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> Ended:
        """Wait until it ends, and kill it when that takes too long."""
        in_time = self._ends_within(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # and what it may have started
        if not in_time:
            self.kill()
        _, code = os.waitpid(self.pid, 0)
        out, error = (_read(file) for file in self._files)
        return Ended(os.waitstatus_to_exitcode(code) if in_time else None, out, error)

    def _ends_within(self, seconds: float) -> bool:
        handle = os.pidfd_open(self.pid)
        try:
            return bool(select.select([handle], [], [], seconds)[0])
        finally:
            os.close(handle)


def call(
    work: Work,
    scratch: Path,
    prepare: Prepare | None = None,
    seconds: float = 60.0,
    room: int = ROOM,
) -> Ended:
    """Do some work in a child; return how it ended."""
    return Child(work, scratch, prepare, room).wait(seconds)


def little_room(draw: random.Random) -> int:
    """Return bytes of address space that may not suffice for a command."""
    return int(2 ** draw.uniform(_LEAST_ROOM, 30))


def command(program, arguments: list[str]) -> Work:
    """Return the work of a command: its program, from the arguments to the exit status."""
    return lambda: run_cli(lambda: program.main(arguments))


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file by its descriptor."""
    handle = os.open(path, flags)
    try:
        yield handle
    finally:
        os.close(handle)


def _be_a_child(work: Work, files: list[Path], prepare: Prepare | None, room: int) -> NoReturn:
    status = 1
    try:
        os.setpgid(0, 0)
        _limit(room)
        for file, handle in zip(files, (1, 2), strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for name, number in {
            "SIGINT": signal.default_int_handler,
            "SIGTERM": signal.SIG_DFL,
        }.items():
            signal.signal(getattr(signal, name), number)
        constants.HF_HUB_OFFLINE = True
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are the parent's
        faulthandler.enable(2)  # of a crash, where in Python it was
        if prepare is not None:
            prepare()
        for name, handle in {"stdin": 0, "stdout": 1, "stderr": 2}.items():
            setattr(sys, name, _stream(handle))
            setattr(sys, f"__{name}__", getattr(sys, name))
        work()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        with contextlib.suppress(Exception):
            traceback.print_exc()
    os._exit(_flushed(status))


def _limit(room: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _stream(handle: int):
    """Return what Python makes of a descriptor when it starts: None where it is closed."""
    try:
        os.fstat(handle)
    except OSError:
        return None
    if handle == 0:
        return os.fdopen(0, closefd=False)
    errors = "strict" if handle == 1 else "backslashreplace"
    line_buffering = handle == 2 or os.isatty(handle)
    stream = os.fdopen(handle, "w", encoding="utf-8", errors=errors, closefd=False)
    stream.reconfigure(line_buffering=line_buffering)
    return stream


def _flushed(status: int) -> int:
    """Do what Python does with stdout when it ends; return the status that it then has."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            if stream is sys.stdout:
                with contextlib.suppress(Exception):
                    print("Exception ignored while stdout was flushed", file=sys.stderr)
                status = FLUSH_FAILED
    return status


def _read(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return stream.read(_OUTPUT).decode("utf-8", "replace")
    except OSError:
        return ""


def wait_until(ready: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something is so, or for so long."""
    end = time.monotonic() + seconds
    while not ready() and time.monotonic() < end:
        time.sleep(0.005)
