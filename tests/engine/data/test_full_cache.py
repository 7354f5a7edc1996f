"""A cache on a disk that is full: one line, before the first step, and no half entry."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engine.data import entry
from engine.data.cache import Reading, load_arrays, load_split, load_vocabulary
from engine.data.origins import DataFile
from engine.data.tokenizer import Tokenizer
from engine.train import main
from engine.utils.errors import InputError

from ..conftest import TINY
from ..disk import file_size_limit
from .written import source

WORDS = Tokenizer.train(["fine dull film 0 1 2 3 4 5 6 7 8 9"] * 3, 90)
ADVICE = "; free some space .see python -m engine.cache --help., or set SUPERBERT_CACHE to a folder"


def write(folder: Path, rows: int) -> Path:
    path = folder / "f.csv"
    path.write_text("text,label\n" + "".join(f"film {n:09},{n % 2}\n" for n in range(rows)))
    return path


def load(path: Path, cache: Path, workers: int = 1) -> int:
    form = source(path.name).format("t")
    return len(load_split(DataFile(path), form, WORDS, 16, cache=cache, reading=Reading(workers)))


@pytest.mark.parametrize("limit", [0, 100, 4096, 1_000_000])
def test_files_that_may_not_grow(tmp_path: Path, limit: int) -> None:
    path, cache = write(tmp_path, 60_000), tmp_path / "cache"
    with file_size_limit(limit), pytest.raises(InputError, match="File too large") as error:
        load(path, cache)
    assert "\n" not in str(error.value)
    assert not any(cache.iterdir())
    assert load(path, cache) == 60_000


def test_other_entries(tmp_path: Path) -> None:
    def write_much(writer: entry.EntryWriter) -> dict[str, object]:
        for _ in range(8):
            writer.append("tokens", WORDS.encode(["film"] * 50_000, 16).tokens)
        return {}

    def learn() -> Tokenizer:
        return WORDS

    with file_size_limit(100):
        with pytest.raises(InputError, match=f"File too large, .*{ADVICE}"):
            load_arrays(["a"], "texts", "sequences", write_much, cache=tmp_path)
        with pytest.raises(InputError, match=f"File too large, .*{ADVICE}"):
            load_vocabulary(["a"], "texts", learn, cache=tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m,mode=0700", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no command mount")
    if done.returncode:
        pytest.skip("mounting a disk in memory is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk(tmp_path: Path, small_disk: Path, workers: int) -> None:
    path = write(tmp_path, 400_000)
    with pytest.raises(InputError, match=f"No space left on device, {small_disk}{ADVICE}") as error:
        load(path, small_disk, workers)
    assert "\n" not in str(error.value)
    assert not any(small_disk.iterdir())
    assert load(write(tmp_path, 20_000), small_disk) == 20_000


@contextmanager
def full(monkeypatch: pytest.MonkeyPatch, after: int) -> Iterator[None]:
    """Refuse to write more than so many arrays."""
    append, count = entry.EntryWriter.append, 0

    def refuse(self, name, array):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, os.strerror(28))
        append(self, name, array)

    with monkeypatch.context() as patch:
        patch.setattr(entry.EntryWriter, "append", refuse)
        yield


@pytest.mark.parametrize("after", [0, 5])
def test_a_run_ends_before_it_begins(tmp_path: Path, monkeypatch, after: int) -> None:
    cache, out = tmp_path / "cache", tmp_path / "run"
    monkeypatch.setenv("SUPERBERT_CACHE", str(cache))
    with full(monkeypatch, after), pytest.raises(InputError, match=f"No space left.*{ADVICE}"):
        main(["demo", "--out", str(out), "--max-steps", "1", "--set", *TINY])
    assert not out.exists()
    assert not any(cache.glob("making-*"))
    assert main(["demo", "--out", str(out), "--max-steps", "1", "--set", *TINY]) == 0
