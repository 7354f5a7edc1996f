"""Processes that tokenize: how they start, what they import, and how they end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.data import prepare, worker_pool
from engine.data.prepare import prepared
from engine.data.rows import Piece, Row, as_pieces
from engine.data.tokenizer import Tokenizer
from engine.data.worker_pool import WorkerPool
from engine.utils.errors import InputError

from ...conftest import REPOSITORY
from .worker_tasks import double, fail, kill_itself, refuse, run_out_of_memory, size_of_piece, tell

WORDS = Tokenizer.train(["fine dull film 0 1 2 3 4 5 6 7 8 9"] * 3, 90)
PIECES = [Piece(number, 1, number, Row) for number in range(12)]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes be started for the first piece."""
    monkeypatch.setattr(prepare, "_HERE", 0)


@contextmanager
def no_process_is_left() -> Iterator[None]:
    before = children(os.getpid())  # of other tests, such as multiprocessing's
    yield
    assert children(os.getpid()) <= before


def children(of: int) -> set[int]:
    """The processes that a process has started, and that have not been waited for."""
    found = set[int]()
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = status.read_text().rpartition(") ")
        except OSError:
            continue
        if int(fields.split()[1]) == of and "python" in name:
            found.add(int(status.parent.name))
    return found


@pytest.mark.parametrize("workers", [1, 2, 5, 40])
def test_what_they_give_back_is_in_order(workers: int) -> None:
    with no_process_is_left():
        assert list(prepared(PIECES, double, WORDS, workers)) == [2 * n for n in range(12)]


def test_no_more_are_started_than_there_are_pieces(monkeypatch) -> None:
    counts = []
    begin = WorkerPool.__init__

    def init(self, preparation, tokenizer, count):
        counts.append(count)
        begin(self, preparation, tokenizer, count)

    monkeypatch.setattr(WorkerPool, "__init__", init)
    assert list(prepared(PIECES[:3], double, WORDS, 500)) == [0, 2, 4]
    assert list(prepared([], double, WORDS, 500)) == []
    assert counts == [3]


def test_what_they_are_like() -> None:
    found = list(prepared(PIECES[:4], tell, WORDS, 2))
    assert len({each["process"] for each in found}) == 2
    for each in found:
        assert not each["torch"]  # which takes seconds and memory
        assert each["session"] not in (0, os.getsid(0))
        assert each["words"] == WORDS.to_json()
        assert each["stdin"] == "/dev/null"
        assert each["files"] < 8  # none of this process


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (kill_itself, r"a process that tokenizes ended \(SIGKILL\), .*fewer --workers"),
        (run_out_of_memory, "a process that tokenizes is out of memory; give fewer --workers"),
        (refuse, "row 5"),
    ],
)
def test_an_end_is_one_line(work, message: str) -> None:
    with no_process_is_left(), pytest.raises(InputError, match=message) as error:
        list(prepared(PIECES, work, WORDS, 3))
    assert "\n" not in str(error.value)


def test_a_defect_is_reported_as_it_was() -> None:
    with no_process_is_left(), pytest.raises(RuntimeError, match="is not subscriptable") as error:
        list(prepared(PIECES, fail, WORDS, 3))
    assert "in fail" in str(error.value)


def test_who_does_not_want_the_rest_ends_them() -> None:
    before = children(os.getpid())
    with no_process_is_left():
        results = prepared(PIECES, double, WORDS, 2)
        assert next(results) == 0
        assert len(children(os.getpid()) - before) == 2
        results.close()


def test_one_that_ends_at_once(monkeypatch) -> None:
    monkeypatch.setattr(worker_pool, "_PROGRAM", "raise SystemExit(7)")
    with (
        no_process_is_left(),
        pytest.raises(InputError, match=r"a process that tokenizes ended \(status 7\)"),
    ):
        list(prepared(PIECES, double, WORDS, 2))


def test_where_no_process_can_be_started(monkeypatch) -> None:
    class Start(subprocess.Popen):
        started = 0

        def __init__(self, *given: object, **named: object) -> None:
            if Start.started == 2:
                raise OSError(11, "Resource temporarily unavailable")
            Start.started += 1
            super().__init__(*given, **named)

    monkeypatch.setattr(worker_pool.subprocess, "Popen", Start)
    message = "cannot start a process that tokenizes: resource temporarily unavailable; give fewer"
    with no_process_is_left(), pytest.raises(InputError, match=message):
        list(prepared(PIECES, double, WORDS, 4))


def test_pieces_larger_than_a_pipe_holds() -> None:
    texts = ["film " * 200_000] * 6
    pieces = as_pieces(texts)
    one = next(pieces)
    several = [one._replace(content=[text]) for text in texts]
    found = list(prepared(several, size_of_piece, WORDS, 3))
    assert found == [(1_000_000, b"x" * 2_000_000)] * 6


READ = """
import sys
from pathlib import Path
from engine.cli.common import run_cli
from engine.data import prepare, table
from engine.data.blocks import blocks_of
from functools import partial
from engine.data.cache import Reading, load_split
from engine.data.origins import DataFile
from engine.data.source import TaskSource
from engine.data.tokenizer import Tokenizer

def main():
    prepare._HERE = 0
    table.blocks_of = partial(blocks_of, size=1 << 12)
    source = TaskSource(kind="classification", text=("text",), classes=2, files={"train": "f.csv"})
    words = Tokenizer.train(["fine film"] * 3, 60)
    file = DataFile(Path(sys.argv[1]))
    print("begin", flush=True)
    split = load_split(file, source.format("t"), words, 16, reading=Reading(3))
    print(len(split))
    return 0

if __name__ == "__main__":
    run_cli(main)
"""


def write(folder: Path, rows: int) -> Path:
    path = folder / "f.csv"
    path.write_text("text,label\n" + "a fine film,1\n" * rows)
    return path


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "SUPERBERT_CACHE": str(folder / "cache"),
        # As torchrun has them.
        "RANK": "1",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "2",
    }


@pytest.mark.parametrize("how", ["plain", "no stdin", "other modules here", "no path"])
def test_from_another_folder(tmp_path: Path, how: str) -> None:
    path = write(tmp_path, 20_000)
    script = tmp_path / "program" / "read.py"
    script.parent.mkdir()
    script.write_text(READ)
    here = tmp_path / "here"
    here.mkdir()
    if how == "other modules here":
        for name in ("numpy", "tokenizers", "traceback", "engine"):
            (here / f"{name}.py").write_text("raise SystemExit('of another program')")
    settings, command = environment(tmp_path), [sys.executable, str(script), str(path)]
    if how == "no path":
        add = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})"
        code = f"{add}; exec(open({str(script)!r}).read())"
        command = [sys.executable, "-c", code, str(path)]
        del settings["PYTHONPATH"]
    if how == "no stdin":
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(
        command, cwd=here, env=settings, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "begin\n20000\n", done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGKILL]])
@pytest.mark.parametrize("moment", ["starting", "at work"])
def test_none_is_left_when_the_program_ends(tmp_path: Path, signals, moment: str) -> None:
    path, script = write(tmp_path, 1_500_000), tmp_path / "read.py"
    script.write_text(READ)
    (tmp_path / "cache").mkdir(mode=0o700)
    with subprocess.Popen(
        [sys.executable, str(script), str(path)],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            assert program.stdout.readline() == "begin\n"
            found = wait_for(lambda: len(own := children(program.pid)) == 3 and own)
            if moment == "at work":
                wait_for(lambda: any((tmp_path / "cache").glob("making-*/made/tokens.npy")))
            for number in signals:
                os.killpg(program.pid, number)
            program.wait(timeout=30)
        finally:
            program.kill()
        assert wait_for(lambda: not any(map(is_alive, found)))
        error = program.stderr.read()
    assert error == ""  # no report of a worker, on the terminal of the user
    left = [entry.name for entry in (tmp_path / "cache").iterdir()]
    assert [name for name in left if not name.startswith("making-")] == []
    if signals == [signal.SIGINT]:
        assert program.returncode == 130
        assert left == []


def is_alive(process: int) -> bool:
    try:
        return "python" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def wait_for(condition):
    """Wait until something is so; return it."""
    until = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.01)
    return found
