"""The cache: a hit equals a miss, damage is noticed, two processes do not disturb each other."""

import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.data import cache as cache_module
from engine.data.cache import default_cache, load_split
from engine.data.formats import FORMATS
from engine.data.source import DataFile
from engine.data.split import TokenizedSplit
from engine.data.tokenizer import Tokenizer
from engine.errors import InputError

from .written import GOOD, source

STS = FORMATS["sts"]


def load(demo: Path, tokenizer: Tokenizer, cache: Path, **changes: object) -> TokenizedSplit:
    arguments = {"max_length": 32, "cache": cache} | changes
    return load_split(DataFile(STS.file(demo, "dev")), STS, tokenizer, **arguments)


def assert_same(one: TokenizedSplit, other: TokenizedSplit) -> None:
    for name in TokenizedSplit.__slots__:
        left, right = getattr(one, name), getattr(other, name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype
            np.testing.assert_array_equal(left, right)
        else:
            assert left == right


@pytest.fixture
def no_tokenizing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(cache_module, "tokenize", refuse)


def test_hit_equals_miss(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    miss = load(demo, tokenizer, tmp_path)
    request.getfixturevalue("no_tokenizing")
    hit = load(demo, tokenizer, tmp_path)
    assert_same(hit, miss)
    assert isinstance(hit.tokens, np.memmap)
    assert hit.tokens.dtype == np.uint16
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("making")] == []


def test_whatever_decides_the_content_makes_another_entry(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    load(demo, tokenizer, tmp_path)
    assert load(demo, tokenizer, tmp_path, max_length=8).truncated > 0
    assert load(demo, tokenizer, tmp_path, labelled=False).labels is None
    load(demo, tokenizer, tmp_path, on_bad_row="skip")
    load(demo, Tokenizer.train(["in the road"], 80), tmp_path)
    changed = tmp_path / "data"
    changed.mkdir()
    content = STS.file(demo, "dev").read_bytes() + b"500\tnew\tone\ttwo\t1\n"
    STS.file(changed, "dev").write_bytes(content)
    assert load(changed, tokenizer, tmp_path).ids[-1] == "new"
    assert len([path for path in tmp_path.iterdir() if len(path.name) == 64]) == 6


def test_bad_rows_are_kept_count_of(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "f.tsv"
    file.write_text("id\tsentence1\tsentence2\na\tone\ttwo\nb\t\ttwo\nc\tone\t\n")
    for _ in range(2):
        split = load_split(
            DataFile(file), STS, tokenizer, 32, labelled=False, on_bad_row="blank", cache=tmp_path
        )
        assert (split.ids, split.blank, split.skipped) == (["a", "b", "c"], (1, 2), 2)
        np.testing.assert_array_equal(split.lengths[2:], 2)


def damage_by_truncation(entry: Path) -> None:
    os.truncate(entry / "tokens.npy", 100)


def damage_by_one_bit(entry: Path) -> None:
    content = bytearray((entry / "offsets.npy").read_bytes())
    content[-3] ^= 1
    (entry / "offsets.npy").write_bytes(content)


def damage_by_removal(entry: Path) -> None:
    (entry / "meta.json").unlink()


def damage_of_the_index(entry: Path) -> None:
    (entry / "index.json").write_text("[]")


def damage_by_emptying(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.mkdir()


def damage_by_a_file_in_its_place(entry: Path) -> None:
    shutil.rmtree(entry)
    entry.write_text("not a folder")


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_truncation,
        damage_by_one_bit,
        damage_by_removal,
        damage_of_the_index,
        damage_by_emptying,
        damage_by_a_file_in_its_place,
    ],
)
def test_damage_is_noticed_and_repaired(
    demo: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    damage: object,
    request: pytest.FixtureRequest,
) -> None:
    whole = load(demo, tokenizer, tmp_path)
    expected = np.array(whole.tokens)
    del whole  # a truncated file under a memory map is a bus error on access
    (entry,) = tmp_path.iterdir()
    damage(entry)
    np.testing.assert_array_equal(load(demo, tokenizer, tmp_path).tokens, expected)
    request.getfixturevalue("no_tokenizing")
    np.testing.assert_array_equal(load(demo, tokenizer, tmp_path).tokens, expected)
    assert list(tmp_path.iterdir()) == [entry]


def _load_in_a_process(arguments: tuple[Path, str, Path]) -> int:
    demo, folder, cache = arguments
    return int(load(demo, Tokenizer.load(Path(folder)), cache).tokens.sum())


def test_processes_at_once(demo: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    cache = tmp_path / "cache"
    jobs = [(demo, str(tmp_path), cache)] * 8
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        sums = pool.map(_load_in_a_process, jobs, chunksize=1)
    assert len(set(sums)) == 1
    assert len(list(cache.iterdir())) == 1


def test_another_process_is_faster(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = cache_module.tokenize

    def overtaken(*args: object) -> TokenizedSplit:
        monkeypatch.setattr(cache_module, "tokenize", original)
        load(demo, tokenizer, tmp_path)
        return original(*args)

    monkeypatch.setattr(cache_module, "tokenize", overtaken)
    assert len(load(demo, tokenizer, tmp_path)) == 500
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_that_cannot_be_written(demo: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="set SUPERBERT_CACHE"):
        load(demo, tokenizer, blocked / "cache")


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUPERBERT_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.setenv("SUPERBERT_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "superbert"


def test_the_cache_tells_dialects_apart(tmp_path: Path) -> None:
    path = tmp_path / "f.csv"
    path.write_bytes("text;label\nfine caf\u00e9, a;1\n".encode("latin-1"))
    tokenizer = Tokenizer.train(["fine café caf, ã"] * 9, 60)
    seen = []
    for encoding in ("latin-1", "cp1251", "latin-1"):
        form = source(delimiter=";", encoding=encoding).format("t")
        seen.append(load_split(DataFile(path), form, tokenizer, 32, cache=tmp_path / "cache"))
    assert seen[0].tokens.tolist() == seen[2].tokens.tolist() != seen[1].tokens.tolist()
    assert len([entry for entry in (tmp_path / "cache").iterdir() if len(entry.name) == 64]) == 2


def test_a_note_names_the_file_that_was_read(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["fine film"] * 9, 60)
    for name in ("one.csv", "two.csv", "one.csv"):  # with one content, and so one entry
        (tmp_path / name).write_text(GOOD.replace(",", "\t"))
        file = DataFile(tmp_path / name)
        split = load_split(file, source().format("t"), tokenizer, 32, cache=tmp_path / "cache")
        note = "separated by tabs, as its header is, not by commas"
        assert split.notes == (f"read {name} as {note}",)
