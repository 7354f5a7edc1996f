"""Commands whose output nobody reads, or goes to a full disk; runs whose window closes."""

import errno
import io
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cli import standard_output
from engine.cli.common import run_cli
from engine.train import main
from engine.training.signals import StopRequest

from ...conftest import REPOSITORY
from ..conftest import TINY


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A device on which there is no room, as /dev/full."""
    device = tmp_path_factory.mktemp("devices") / "full"
    try:
        os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 7))
        device.open("w").close()
    except OSError:
        pytest.skip("needs the right to make devices")
    return device


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, full) -> Path:
    """A run that was trained with its output on a full disk."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    ended = command("train", "demo", "--out", folder, *SHORT, stdout=full.open("wb"))
    assert ended.returncode == 0
    assert ended.stderr == "cannot write to stdout: no space left on device; going on without\n"
    return folder


SHORT = ("--device", "cpu", "--max-steps", "2", "--set", *TINY)


def command(name, *arguments, stdout: io.BufferedWriter) -> subprocess.CompletedProcess[str]:
    """Run a command whose output goes to a file, which is closed then."""
    line = [sys.executable, "-m", f"engine.{name}", *map(str, arguments)]
    with stdout:
        return subprocess.run(
            line, cwd=REPOSITORY, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=300
        )


def closed_pipe() -> io.BufferedWriter:
    """A pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    return os.fdopen(writing, "wb")


def test_training_on_a_full_disk_is_done(run_folder):
    assert (run_folder / "metrics.json").is_file()
    assert list((run_folder / "checkpoints").glob("best-*"))


@pytest.mark.parametrize("arguments", [("train", "--list"), ("evaluate", "{run}")])
def test_output_that_is_lost_is_not_done(arguments, run_folder, full):
    (run_folder / "metrics.json").unlink(missing_ok=True)
    ended = command(*(text.format(run=run_folder) for text in arguments), stdout=full.open("wb"))
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: cannot write to stdout: no space left on device; make ")
    assert ended.stderr.count("\n") == 1
    assert (run_folder / "metrics.json").is_file() == (arguments[0] == "evaluate")


def test_a_pipe_that_nobody_reads(run_folder):
    """As after ``| head -1``."""
    ended = command("evaluate", run_folder, stdout=closed_pipe())
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("program", ["train", "sweep"])
def test_training_into_a_pipe_that_nobody_reads(tmp_path, program):
    arguments = (program, "demo", "--out", tmp_path / "run", *SHORT)
    ended = command(*arguments, stdout=closed_pipe())
    assert (ended.returncode, ended.stderr) == (0, "")
    assert list((tmp_path / "run").rglob("metrics.json"))


@pytest.fixture
def hangups_count():
    """Where the tests run under nohup, which the processes that they start inherit."""
    usual = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, usual)


@pytest.mark.usefixtures("hangups_count")
def test_a_closed_window_leaves_a_checkpoint(tmp_path):
    """The terminal hangs up: two signals, and no more output."""
    folder, (leader, terminal) = tmp_path / "run", os.openpty()
    line = [sys.executable, "-m", "engine.train", "demo", "--out", str(folder), *SHORT]
    line[line.index("--max-steps") + 1] = "1000000"
    process = subprocess.Popen(
        [*line, "epochs=1000000"],
        cwd=REPOSITORY,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        end = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() and time.monotonic() < end:
            os.read(leader, 1 << 16)
        os.close(leader)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=60) == 128 + signal.SIGHUP
    finally:
        process.kill()
        process.wait()
    assert list((folder / "checkpoints").glob("step-*/manifest.json"))
    assert not list(folder.rglob("*.partial"))


class Failing(io.StringIO):
    """A stream whose writes fail with an error of the system."""

    def __init__(self, number: int, *, terminal: bool) -> None:
        super().__init__()
        self.number, self.terminal = number, terminal

    def isatty(self) -> bool:
        return self.terminal

    def flush(self) -> None:
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("own_status", [0, 3])
@pytest.mark.parametrize(
    ("number", "terminal", "status"),
    [
        (errno.EPIPE, False, 141),
        (errno.ECONNRESET, False, 141),
        (errno.EIO, True, 141),
        (errno.EIO, False, 2),
        (errno.ENOSPC, False, 2),
        (errno.EDQUOT, False, 2),
        (errno.EAGAIN, False, 2),
    ],
)
def test_the_status_of_lost_output(
    monkeypatch, capsys, number, terminal, status, own_status, needed
):
    monkeypatch.setattr(sys, "stdout", Failing(number, terminal=terminal))

    def print_text() -> int:
        if not needed:
            standard_output.train_without_output()
        print("text", flush=True)
        return own_status

    with pytest.raises(SystemExit) as ended:
        standard_output.exit_with(print_text)
    assert ended.value.code == (status if needed and own_status == 0 else own_status)
    told = capsys.readouterr().err
    is_told = status == 2 and (not needed or own_status == 0)
    assert told.count("cannot write to stdout: ") == is_told


@pytest.mark.parametrize(
    ("code", "status", "text"),
    [
        (None, 0, ""),
        (3, 3, ""),
        ("nothing to draw", 1, "nothing to draw\n"),
        ("", 1, "\n"),
        (2.5, 1, "2.5\n"),
    ],
)
def test_what_a_command_is_left_with(capsys, code, status, text):
    """As Python itself ends on a SystemExit: a text is printed."""

    def leave() -> int:
        raise SystemExit(code)

    with pytest.raises(SystemExit) as ended:
        standard_output.exit_with(leave)
    assert ended.value.code == status
    assert capsys.readouterr() == ("", text)


@pytest.mark.parametrize("option", ["--help", "--version", "--list", "--fields"])
def test_what_argparse_and_options_print_counts(monkeypatch, capsys, option):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC, terminal=False))
    with pytest.raises(SystemExit) as ended:
        run_cli(lambda: main([option]))
    assert ended.value.code == 2
    assert "cannot write to stdout: no space left on device" in capsys.readouterr().err


def test_hanging_up_is_ignored_under_nohup():
    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, usual)


def test_a_second_sigterm_counts_only_later(monkeypatch):
    """Slurm may signal torchrun and its workers, and torchrun signals its workers."""
    ended = []
    usual = signal.signal(signal.SIGTERM, lambda number, _frame: ended.append(number))
    now = 100.0
    monkeypatch.setattr("engine.training.signals.time.monotonic", lambda: now)
    try:
        with StopRequest() as stop:
            for _ in range(3):
                signal.raise_signal(signal.SIGTERM)
            assert stop.signal == signal.SIGTERM
            assert not ended
            now += 6
            signal.raise_signal(signal.SIGTERM)
        assert ended == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(ended) == 2
    finally:
        signal.signal(signal.SIGTERM, usual)


@pytest.mark.usefixtures("hangups_count")
def test_hanging_up_twice_stops_once():
    with StopRequest() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
