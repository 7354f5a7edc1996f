"""A folder is one process's at a time, and nobody's when that has died."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from engine import sweep, train
from engine.runs.folder import check_folder, claimed, free_folders
from engine.runs.lock import LOCK, held, held_first
from engine.utils.errors import InputError

from ...conftest import REPOSITORY

HOLD = """
import sys
from pathlib import Path

from engine.runs.folder import free_folders
from engine.runs.lock import held, held_first

how, folder = sys.argv[1], Path(sys.argv[2])
with held(folder) if how == "held" else held_first(free_folders(folder, "demo")) as found:
    print(found or folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start():
    """Start processes that hold a folder until they are told to end."""
    processes = []

    def begin(how: str, folder: Path) -> tuple[subprocess.Popen[str], Path]:
        command = [sys.executable, "-c", HOLD, how, str(folder)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, text=True)
        processes.append(process)
        return process, Path(process.stdout.readline().strip())

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def test_the_second_process_gets_one_line_until_the_first_dies(start, tmp_path):
    folder = tmp_path / "new/run"
    process, found = start("held", folder)
    assert found == folder
    for hold in (held(folder), claimed(folder, resumes=True), claimed(folder)):
        with pytest.raises(InputError, match="another process is at work there") as refusal, hold:
            pass
        assert "\n" not in str(refusal.value)
    assert os.listdir(folder) == [LOCK]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with held(folder):
        (folder / "ours").touch()
    assert sorted(os.listdir(folder)) == [LOCK, "ours"]


def test_what_is_waited_for_comes(start, tmp_path):
    process, _ = start("held", tmp_path / "run")
    threading.Timer(0.3, process.kill).start()
    with held(tmp_path / "run", wait=60):
        pass


def test_processes_that_start_together_take_different_folders(start, tmp_path):
    found = {start("first", tmp_path / "runs")[1] for _ in range(2)}
    assert found == {tmp_path / f"runs/demo-{number}" for number in (1, 2)}


def test_folders_that_appear_meanwhile_are_passed_over(tmp_path):
    for name in ("demo-1", "demo-4"):
        (tmp_path / name).mkdir()
    (tmp_path / "demo-2").symlink_to("nowhere")
    free = free_folders(tmp_path, "recipes/demo.toml")
    for name in ("demo-3", "demo-5"):
        with held_first([tmp_path / "demo-1", tmp_path / "demo-2", *[next(free)]]) as folder:
            assert folder == tmp_path / name
            (folder / "ours").touch()


def test_a_block_that_adds_nothing_leaves_nothing(tmp_path):
    mine, theirs = tmp_path / "a/b/run", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "recipe.toml").touch()
    (empty := tmp_path / "empty").mkdir()
    for folder in (mine, theirs, empty):
        with claimed(folder, resumes=True):
            assert (folder / LOCK).exists()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "recipe.toml", "theirs"]


def test_a_folder_made_by_another_rank_meanwhile_is_free(tmp_path):
    folder, ends = tmp_path / "run", threading.Event()

    def make_again_and_again() -> None:
        while not ends.is_set():
            folder.mkdir()
            folder.rmdir()

    thread = threading.Thread(target=make_again_and_again)
    thread.start()
    try:
        for _ in range(20000):
            check_folder(folder, resumes=False)
    finally:
        ends.set()
        thread.join()


@pytest.mark.parametrize("resumes", [False, True])
def test_a_file_is_no_folder_of_a_run(tmp_path, resumes):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"holds (something|no run)"):
        check_folder(tmp_path / "file", resumes=resumes)


def test_no_folder_is_called_so(tmp_path):
    """A command line cannot say it, but a recipe's or a caller's path can."""
    with pytest.raises(InputError, match=r"--out '.*a\\x00b': embedded null byte; give another"):
        check_folder(tmp_path / "a\0b", resumes=False)


def test_what_a_killed_process_began_is_gone_on_with(tmp_path):
    for name in (LOCK, "vocab.txt", ".recipe.toml-0123abcd.partial"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match="holds something already"), claimed(tmp_path):
        pass
    with claimed(tmp_path, resumes=True):
        assert sorted(os.listdir(tmp_path)) == [LOCK, "vocab.txt"]


@pytest.mark.parametrize(
    "names", [["vocab.txt"], ["notes"], ["notes", LOCK], [".x-0123abcd.partial", LOCK], [".lock"]]
)
def test_what_somebody_else_began_is_not(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("mine")
    for resumes in (False, True):
        with (
            pytest.raises(InputError, match=r"holds (something|no run)"),
            claimed(tmp_path, resumes=resumes),
        ):
            pass
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_lock_that_is_none(tmp_path, kind):
    (tmp_path / "outside").write_text("theirs")
    (folder := tmp_path / "run").mkdir()
    if kind == "link":
        (folder / LOCK).symlink_to("../outside")
    else:
        (folder / LOCK).mkdir()
    with pytest.raises(InputError, match="cannot lock"), held(folder):
        pass
    assert (tmp_path / "outside").read_text() == "theirs"
    assert os.listdir(folder) == [LOCK]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    folder = tmp_path / "run"
    if number == errno.ENOLCK:
        with pytest.raises(InputError, match=r"cannot lock .*no locks available"), held(folder):
            pass
    else:
        with held(folder):
            assert "this file system has no flock" in caplog.text
            with pytest.raises(InputError, match="another process"), held(folder):
                pass
    assert not folder.exists()


def test_every_command_that_trains_asks(start, tmp_path):
    folder = tmp_path / "run"
    start("held", folder)
    options = ["demo", "--out", str(folder)]
    for command, more in (
        (train.main, []),
        (train.main, ["--resume"]),
        (train.main, ["--seeds", "2"]),
        (sweep.main, []),
    ):
        with pytest.raises(InputError, match="another process is at work there"):
            command([*options, *more])
    assert os.listdir(folder) == [LOCK]
