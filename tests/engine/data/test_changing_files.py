"""Files that change: between two starts, and while they are read."""

import os
from pathlib import Path

import fsspec
import pytest

from engine.data import cache as cache_module
from engine.data.cache import Reading, load_split
from engine.data.origins import DataFile
from engine.data.source import TaskSource
from engine.data.split import TokenizedSplit
from engine.data.tokenizer import Tokenizer
from engine.utils import fingerprint
from engine.utils.errors import InputError

from .written import source

WORDS = Tokenizer.train(["fine dull film 0 1 2 3 4 5 6 7 8 9"] * 3, 90)
ROWS = [f"film {number:09},{number % 2}\n" for number in range(60_000)]
FEW = 40


def write(path: Path, rows: list[str]) -> None:
    path.write_text("text,label\n" + "".join(rows))


def load(path: Path, *, verify: bool = False, **files: object) -> TokenizedSplit:
    one = source(path.name, **files)
    cache = path.parent / "cache"
    found = one.origin("t", "train", path.parent)
    return load_split(found, one.format("t"), WORDS, 16, cache=cache, reading=Reading(1, verify))


def labels(split: TokenizedSplit) -> list[int]:
    return split.labels.astype(int).tolist()


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let files of more than 64 KiB be large, of which 8 bytes are looked at in 4 places."""
    monkeypatch.setattr(fingerprint, "WHOLE", 1 << 16)
    monkeypatch.setattr(fingerprint, "_SAMPLE", 8)
    monkeypatch.setattr(fingerprint, "_SAMPLES", 4)


def change_in_the_middle(path: Path, *, keep_time: bool) -> None:
    """Turn a label, far from the samples."""
    before, content = path.stat(), bytearray(path.read_bytes())
    at = content.index(b",0\n", len(content) // 2) + 1
    content[at] ^= 1
    path.write_bytes(content)
    later = 0 if keep_time else 1_000_000_000
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))


@pytest.mark.usefixtures("large")
def test_a_large_file_is_known_by_time_size_and_samples(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    write(path, ROWS)
    before = labels(load(path))
    change_in_the_middle(path, keep_time=True)
    assert labels(load(path)) == before  # missed
    assert labels(load(path, verify=True)) != before
    assert labels(load(path)) == before
    change_in_the_middle(path, keep_time=False)
    after = labels(load(path))
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 2


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("at", [0, -1])
def test_its_first_and_last_bytes_are_samples(tmp_path: Path, at: int) -> None:
    path = tmp_path / "f.csv"
    write(path, ROWS)
    before, digest = path.stat(), DataFile(path).digest()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert DataFile(path).digest() != digest


def test_a_small_file_is_known_by_all_of_it(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    write(path, ROWS[:FEW])
    before = labels(load(path))
    digest = DataFile(path).digest()
    os.utime(path, (0, 0))
    assert DataFile(path).digest() == digest
    change_in_the_middle(path, keep_time=True)
    assert labels(load(path)) != before


@pytest.mark.usefixtures("large")
def test_many_small_files_are_large_together(tmp_path: Path) -> None:
    """They are not all read whole at each start."""
    for part in range(8):
        write(tmp_path / f"{part}.csv", ROWS[1000 * part :][:1000])
    pattern = tmp_path / "*.csv"
    assert sum(path.stat().st_size for path in tmp_path.glob("*.csv")) > fingerprint.WHOLE
    assert (tmp_path / "0.csv").stat().st_size < fingerprint.WHOLE
    before = labels(load(pattern))
    change_in_the_middle(tmp_path / "3.csv", keep_time=True)
    assert labels(load(pattern)) == before
    assert labels(load(pattern, verify=True)) != before
    change_in_the_middle(tmp_path / "3.csv", keep_time=False)
    assert labels(load(pattern)) != before


@pytest.mark.usefixtures("large")
def test_damage_within_a_large_file_of_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    write(path, ROWS)
    before = labels(load(path, verify=True))
    (entry,) = (tmp_path / "cache").iterdir()
    content = bytearray((entry / "labels.npy").read_bytes())
    at = len(content) // 2 + 1000
    content[at : at + 4] = b"\0\0\0\x40"
    (entry / "labels.npy").write_bytes(content)
    assert labels(load(path, verify=True)) == before
    assert list((tmp_path / "cache").iterdir()) == [entry]


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("more,1\n")


def replace(path: Path) -> None:
    other = path.with_name("other")
    write(other, ROWS[1:])
    other.replace(path)


def write_over(path: Path) -> None:
    """With as many bytes."""
    change_in_the_middle(path, keep_time=False)


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [append, replace, write_over, shorten, remove])
@pytest.mark.parametrize("rows", [FEW, 60_000])
@pytest.mark.parametrize("name", ["f.csv", "*.csv"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch, change, rows: int, name: str
) -> None:
    path = tmp_path / "f.csv"
    write(path, ROWS[:rows])
    if name == "*.csv":
        write(tmp_path / "g.csv", ROWS[:FEW])
    prepared = cache_module.prepared

    def disturbed(*given: object) -> object:
        for number, piece in enumerate(prepared(*given)):
            if not number:
                change(path)
            yield piece

    monkeypatch.setattr(cache_module, "prepared", disturbed)
    with pytest.raises(InputError, match=r"f\.csv") as error:
        load(tmp_path / name)
    assert "changed while it was read" in str(error.value) or change is shorten
    assert "\n" not in str(error.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_file_of_a_store_that_changes_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/changing.csv", b"text,label\nfilm,1\n")
    prepared = cache_module.prepared

    def disturbed(*given: object) -> object:
        store.pipe("/changing.csv", b"text,label\nfilm,1\nmore,0\n")
        return prepared(*given)

    monkeypatch.setattr(cache_module, "prepared", disturbed)
    one: TaskSource = source(files={"train": "memory://changing.csv"})
    with pytest.raises(InputError, match=r"changed while it was read, memory://changing.csv"):
        load_split(
            one.origin("t", "train", None), one.format("t"), WORDS, 16, cache=tmp_path / "cache"
        )
    assert list((tmp_path / "cache").iterdir()) == []
    store.rm("/changing.csv")


def test_a_file_that_cannot_be_read_on(tmp_path: Path, monkeypatch) -> None:
    """As on a disk with a fault: the cache is not to blame."""
    path = tmp_path / "f.csv"
    write(path, ROWS)

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    def pieces(file: object, *_: object) -> object:
        yield file.read(1 << 19)
        fail()

    monkeypatch.setattr("engine.data.table.decompressed", pieces)
    with pytest.raises(InputError, match=r"^cannot read .*f.csv: input/output error$"):
        load(path)
    assert not any((tmp_path / "cache").glob("*"))
