"""engine.cache: what it lists, what it removes, and what it never touches."""

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from engine import cache
from engine.data.cache import load_split
from engine.data.origins import DataFile
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from ..conftest import REPOSITORY
from .data.written import source

WORDS = Tokenizer.train(["fine dull film"] * 3, 60)
DAY = 24 * 60 * 60


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, which is not there yet."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SUPERBERT_CACHE", str(folder))
    monkeypatch.setenv("COLUMNS", "200")
    return folder


def make(tmp_path: Path, name: str, days: float = 0.0, rows: int = 3) -> Path:
    """An entry of a file of that name, last used so many days ago."""
    (tmp_path / name).write_text("text,label\n" + f"fine film {name},1\ndull,0\n" * rows)
    before = entries(tmp_path / "cache")
    load_split(DataFile(tmp_path / name), source(name).format("t"), WORDS, 16)
    (entry,) = (e for e in entries(tmp_path / "cache") - before if len(e.name) == 64)
    then = time.time() - days * DAY
    os.utime(entry, (then, then))
    return entry


def entries(root: Path) -> set[Path]:
    return set(root.iterdir()) if root.exists() else set()


def size_of(entry: Path) -> int:
    return sum(file.stat().st_size for file in entry.iterdir())


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cache.main(options) == 0
    return capsys.readouterr().out


def test_the_list(root, tmp_path, capsys) -> None:
    make(tmp_path, "old.csv", days=40)
    make(tmp_path, "new.csv", rows=5)
    lines = printed(capsys).splitlines()
    (first,) = (line for line in lines if "new.csv" in line)
    (second,) = (line for line in lines if "old.csv" in line)
    assert lines.index(first) < lines.index(second)
    assert "tokens of 10 rows of t" in first
    assert "tokens of 6 rows of t" in second
    assert time.strftime("%Y-%m-%d", time.localtime(time.time() - 40 * DAY)) in second
    assert lines[-1].startswith("2 entries, ")
    assert lines[-1].endswith(f"in {root}")


@pytest.mark.parametrize("made", [False, True])
def test_a_missing_and_an_empty_cache(root: Path, capsys, made: bool) -> None:
    if made:
        root.mkdir(mode=0o700)
    for options in ([], ["--keep", "0"], ["--unused-for", "0"]):
        assert printed(capsys, *options).endswith(f"0 entries, 0 bytes, in {root}\n")
    assert root.exists() == made


def test_a_use_counts(root, tmp_path, capsys) -> None:
    make(tmp_path, "f.csv", days=40)
    load_split(DataFile(tmp_path / "f.csv"), source("f.csv").format("t"), WORDS, 16)
    assert "removed 0 entries" in printed(capsys, "--unused-for", "30")


def test_unused_for(root, tmp_path, capsys) -> None:
    old, new = make(tmp_path, "old.csv", days=31), make(tmp_path, "new.csv", days=29)
    assert "removed 1 entry," in printed(capsys, "--unused-for", "30")
    assert entries(root) == {new}
    assert not old.exists()
    assert "removed 0 entries" in printed(capsys, "--unused-for", "29.5")
    assert "removed 1 entry," in printed(capsys, "--unused-for", "0")
    assert entries(root) == set()


def test_keep(root, tmp_path, capsys) -> None:
    made = [make(tmp_path, f"{days}.csv", days) for days in (3, 2, 1)]
    size = sum(map(size_of, made))
    assert "removed 0 entries" in printed(capsys, "--keep", str(size))
    assert "removed 1 entry," in printed(capsys, "--keep", str(size - 1))
    assert entries(root) == set(made[1:])
    assert "removed 2 entries" in printed(capsys, "--keep", "0")
    assert entries(root) == set()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("--keep", bad) for bad in ("-1", "x", "5X", "nan", "inf", "1e30", "G", "20GB", "")),
        *(("--unused-for", bad) for bad in ("-1", "x", "nan", "inf", "30d", "")),
    ],
)
def test_bad_numbers(root: Path, capsys, option: str, value: str) -> None:
    with pytest.raises(SystemExit) as end:
        cache.main([f"{option}={value}"])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert line.startswith(f"error: argument {option}: {value!r}: invalid, give a ")


@pytest.mark.parametrize(("text", "size"), [("1.5k", 1536), ("2M", 2 << 20), ("1T", 1 << 40)])
def test_sizes(text: str, size: int) -> None:
    assert cache._bytes(text) == size


def test_damaged_entries(root, tmp_path, capsys) -> None:
    one, other = make(tmp_path, "one.csv"), make(tmp_path, "other.csv")
    (one / "about.json").unlink()
    (other / "about.json").write_text('{"data": "\\u001b[31mred[bold]", "what": 5}')
    said = printed(capsys)
    assert "damaged" in said
    assert "\x1b[31m" not in said
    assert "[bold]" in said
    assert "removed 2 entries" in printed(capsys, "--keep", "0")
    assert entries(root) == set()


def test_what_is_not_an_entry_stays(root, tmp_path, capsys) -> None:
    make(tmp_path, "f.csv")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (root / "notes.txt").write_text("mine")
    (root / "demo-0123456789ab").mkdir()
    (root / ("a" * 64)).symlink_to(outside)
    (root / ("b" * 64)).write_text("a file")
    (root / ("C" * 64)).mkdir()
    (root / "making-link").symlink_to(outside)
    (root / "making it").mkdir()
    kept = {path.name for path in entries(root) if len(path.name) != 64 or path.name[0] in "abC"}
    kept -= {entry.name for entry in entries(root) if (entry / "index.json").exists()}
    old = time.time() - 40 * DAY
    os.utime(root / "making it", (old, old))
    assert "removed 1 entry," in printed(capsys, "--keep", "0", "--unused-for", "0")
    assert {path.name for path in entries(root)} == kept
    assert (outside / "file").read_text() == "precious"


def test_a_link_to_the_cache(root, tmp_path, capsys, monkeypatch) -> None:
    entry = make(tmp_path, "f.csv")
    link = tmp_path / "link"
    link.symlink_to(root)
    monkeypatch.setenv("SUPERBERT_CACHE", str(link))
    assert "f.csv" in printed(capsys)
    assert "removed 1 entry," in printed(capsys, "--keep", "0")
    assert not entry.exists()


def test_a_cache_that_is_no_folder(root: Path) -> None:
    root.write_text("")
    with pytest.raises(InputError, match=r"cannot look into .*cache: not a directory"):
        cache.main([])


def test_a_cache_that_others_can_write(root, tmp_path) -> None:
    entry = make(tmp_path, "f.csv")
    root.chmod(0o777)
    for options in ([], ["--keep", "0"]):
        with pytest.raises(InputError, match="can be written by others"):
            cache.main(options)
    assert entry.exists()


MAKE_FOREVER = """
import sys, time
from pathlib import Path
from engine.data.workshop import workshop
with workshop(Path(sys.argv[1])) as folder:
    (folder / "tokens.npy").write_bytes(b"x" * 1000)
    print(folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def begin() -> Iterator[Callable[[Path], tuple[subprocess.Popen[str], Path]]]:
    """Start a process that makes an entry; return it and the folder of what it makes."""
    with ExitStack() as stack:

        def start(root: Path) -> tuple[subprocess.Popen[str], Path]:
            command = [sys.executable, "-c", MAKE_FOREVER, str(root)]
            process = stack.enter_context(
                subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            return process, Path(process.stdout.readline().strip()).parent

        yield start


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def test_what_a_process_makes_stays_until_it_is_killed(root, tmp_path, capsys, begin) -> None:
    make(tmp_path, "f.csv")
    process, making = begin(root)
    old = time.time() - 40 * DAY
    for path in (making, making / "made"):
        os.utime(path, (old, old))
    assert "killed processes" not in printed(capsys, "--unused-for", "30")
    assert (making / "made/tokens.npy").exists()
    end(process)
    printed(capsys)  # removes nothing
    assert making.exists()
    assert "and 1.0 kB that killed processes left" in printed(capsys, "--unused-for", "30")
    assert not making.exists()


def test_the_next_entry_clears_what_a_killed_process_left(root, tmp_path, begin) -> None:
    root.mkdir(mode=0o700)
    process, making = begin(root)
    _, alive = begin(root)
    end(process)
    make(tmp_path, "f.csv")
    assert not making.exists()
    assert alive.exists()


@pytest.mark.parametrize("has_lock", [False, True])
def test_where_locks_do_not_tell_the_time_does(root, capsys, monkeypatch, has_lock) -> None:
    for name, days in (("making-old", 2), ("making-new", 0.5)):
        folder = root / name
        folder.mkdir(parents=True, mode=0o700)
        if has_lock:
            (folder / "lock").touch()
        (folder / "rows").touch()
        then = time.time() - days * DAY
        for path in (*folder.iterdir(), folder):
            os.utime(path, (then, then))

    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    printed(capsys, "--keep", "0")
    assert [path.name for path in root.iterdir()] == ["making-new"]


def test_two_that_remove_at_once(root, tmp_path, capsys, monkeypatch) -> None:
    entry = make(tmp_path, "f.csv")
    found = cache.entries_of(root)
    cache.remove_entry(found[0])
    monkeypatch.setattr(cache, "entries_of", lambda _: found)
    assert not entry.exists()
    assert "removed 1 entry," in printed(capsys, "--keep", "0")
    assert entries(root) == set()


def test_a_removed_entry_is_still_there_for_who_has_it_open(root, tmp_path, capsys) -> None:
    make(tmp_path, "f.csv")
    split = load_split(DataFile(tmp_path / "f.csv"), source("f.csv").format("t"), WORDS, 16)
    expected = split.tokens.tolist()
    printed(capsys, "--keep", "0")
    assert split.tokens.tolist() == expected


def test_an_entry_that_can_be_read_alone(root, tmp_path, monkeypatch) -> None:
    """As in a cache that is mounted so: its time of use cannot be kept."""
    entry = make(tmp_path, "f.csv")

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(os, "rename", refuse)
    load_split(DataFile(tmp_path / "f.csv"), source("f.csv").format("t"), WORDS, 16)
    assert json.loads((entry / "about.json").read_text())["data"] == "f.csv"
