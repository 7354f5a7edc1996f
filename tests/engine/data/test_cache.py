"""The cache: a hit equals a miss, damage is noticed, two processes do not disturb each other."""

import grp
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.config.recipe import Recipe
from engine.data import cache as cache_module
from engine.data import entry
from engine.data.cache import default_cache, load_arrays, load_split
from engine.data.origins import DataFile, DataFiles
from engine.data.split import TokenizedSplit
from engine.data.table import bad_row_lines
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.runs.data_paths import data_folder
from engine.utils import ownership
from engine.utils.errors import InputError
from engine.utils.ownership import check_private_place

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
    def refuse(*_: object) -> None:
        raise AssertionError("tokenized again")

    monkeypatch.setattr(cache_module, "prepared", refuse)


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
    assert len(load(changed, tokenizer, tmp_path)) == 501
    assert len([path for path in tmp_path.iterdir() if len(path.name) == 64]) == 6


def test_the_cache_tells_special_tokens_apart(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    content = tokenizer.to_json().replace("[CLS]", "<one>")
    spelled = ["[PAD]", "[UNK]", "<one>", "[SEP]", "[MASK]"]
    for end in ("[SEP]", "<one>"):  # as tokenizer_config.json may say of one tokenizer.json
        spelled[3] = end
        words = Tokenizer.from_json(content, spelled)
        assert load(demo, words, tmp_path).tokens[-1] == words.sep_id


def test_bad_rows_are_kept_count_of(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "f.tsv"
    file.write_text("id\tsentence1\tsentence2\na\tone\ttwo\nb\t\ttwo\nc\tone\t\n")
    for _ in range(2):
        split = load_split(
            DataFile(file), STS, tokenizer, 32, labelled=False, on_bad_row="blank", cache=tmp_path
        )
        assert (len(split), split.blank, split.skipped) == (3, (1, 2), 2)
        np.testing.assert_array_equal(split.lengths[2:], 2)


def test_the_first_bad_row_is_named_in_the_file_that_is_read_now(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files = [tmp_path / folder / name for name in ("a.tsv", "b.tsv")]
        files[0].write_text("id\tsentence1\tsentence2\na\tone\ttwo\n")
        files[1].write_text("id\tsentence1\tsentence2\na\tone\ttwo\nb\t\ttwo\nc\t\tone\n")
        split = load_split(
            DataFiles(tuple(map(DataFile, files))),
            *(STS, tokenizer, 32),
            labelled=False,
            on_bad_row="skip",
            cache=tmp_path / "cache",
        )
        (line,) = bad_row_lines(split.bad_rows, split.first_bad)
        assert line == (
            "2 rows skipped (empty sentence); the first: "
            f"column 'sentence1', {files[1]}:3; correct the row"
        )
    assert len([*(tmp_path / "cache").glob("*/meta.json")]) == 1


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
    original = cache_module.prepared

    def overtaken(*args: object) -> object:
        monkeypatch.setattr(cache_module, "prepared", original)
        load(demo, tokenizer, tmp_path)
        return original(*args)

    monkeypatch.setattr(cache_module, "prepared", overtaken)
    assert len(load(demo, tokenizer, tmp_path)) == 500
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("kind", ["split", "arrays"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_an_entry_that_is_removed_before_it_is_open(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch, kind: str, times: int
) -> None:
    """As ``python -m engine.cache --keep 0`` may."""
    removed, rename = [], os.rename

    def and_remove(made: Path, entry: Path) -> None:
        rename(made, entry)
        if Path(made).name == "made" and len(removed) < times:
            removed.append(entry)
            shutil.rmtree(entry)

    monkeypatch.setattr(cache_module.os, "rename", and_remove)

    def loaded() -> int:
        if kind == "split":
            return len(load(demo, tokenizer, tmp_path / "cache"))

        def write(writer: entry.EntryWriter) -> dict[str, int]:
            writer.append("tokens", np.arange(5))
            return {}

        arrays, _ = load_arrays(["x"], "x", "x", write, cache=tmp_path / "cache")
        return len(arrays["tokens"])

    if times < 3:
        assert loaded() > 0
    else:
        with pytest.raises(InputError, match="cannot write the cache of tokenized data"):
            loaded()
    assert len(removed) == times


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


def others_own_the_entry(entry: Path) -> None:
    os.chown(entry, 12345, -1)


def others_own_a_file(entry: Path) -> None:
    os.chown(entry / "index.json", 12345, -1)


def others_may_write_the_entry(entry: Path) -> None:
    entry.chmod(0o707)


def others_may_write_a_file(entry: Path) -> None:
    (entry / "tokens.npy").chmod(0o606)


def a_group_may_write_a_file(entry: Path) -> None:
    os.chown(entry / "tokens.npy", -1, 12345)
    (entry / "tokens.npy").chmod(0o660)


def a_link_in_the_place_of_a_file(entry: Path) -> None:
    (entry / "tokens.npy").rename(entry.parent.parent / "elsewhere.npy")
    (entry / "tokens.npy").symlink_to(entry.parent.parent / "elsewhere.npy")


def a_link_in_the_place_of_the_entry(entry: Path) -> None:
    entry.rename(entry.parent.parent / "elsewhere")
    entry.symlink_to(entry.parent.parent / "elsewhere")


def an_index_that_leads_out(entry: Path) -> None:
    shutil.copy(entry / "tokens.npy", entry.parent.parent / "elsewhere.npy")
    index = json.loads((entry / "index.json").read_text())
    index["../../elsewhere.npy"] = index["tokens.npy"]
    (entry / "index.json").write_text(json.dumps(index))


FORGERIES = [
    others_own_the_entry,
    others_own_a_file,
    others_may_write_the_entry,
    others_may_write_a_file,
    a_group_may_write_a_file,
    a_link_in_the_place_of_a_file,
    a_link_in_the_place_of_the_entry,
    an_index_that_leads_out,
]


@pytest.mark.parametrize("forge", FORGERIES)
def test_an_entry_that_others_may_have_written_is_made_anew(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path, forge, request: pytest.FixtureRequest
) -> None:
    if os.geteuid() and ("own" in forge.__name__ or "group" in forge.__name__):
        pytest.skip("only root gives files away")
    cache = tmp_path / "cache"
    expected = np.array(load(demo, tokenizer, cache).tokens)
    (entry,) = cache.iterdir()
    forge(entry)
    np.testing.assert_array_equal(load(demo, tokenizer, cache).tokens, expected)
    (entry,) = cache.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o700
    assert all(p.is_file() and p.stat().st_mode & 0o777 == 0o600 for p in entry.iterdir())
    request.getfixturevalue("no_tokenizing")
    load(demo, tokenizer, cache)


@pytest.mark.parametrize("mode", [0o777, 0o702, 0o1777])
@pytest.mark.parametrize("which", ["cache", "its parent"])
def test_a_cache_that_others_may_write_is_refused(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path, mode: int, which: str
) -> None:
    """Others could rename entries; not where the sticky bit is set."""
    cache = tmp_path / "shared" / "cache"
    cache.mkdir(parents=True)
    (cache if which == "cache" else cache.parent).chmod(mode)
    if mode & 0o1000:
        assert len(load(demo, tokenizer, cache)) == 500
        return
    with pytest.raises(InputError, match=r"can be written by others; set SUPERBERT_CACHE"):
        load(demo, tokenizer, cache)
    assert not any(cache.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_cache_of_another_user_is_refused(
    demo: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    os.chown(tmp_path / "cache", 12345, -1)
    with pytest.raises(InputError, match=r"belongs to another user; set SUPERBERT_CACHE"):
        load(demo, tokenizer, tmp_path / "cache")


def test_a_group_of_the_users_own_may_write(tmp_path: Path, monkeypatch) -> None:
    """As with umask 002 where every user has a group of that name."""
    tmp_path.chmod(0o770)
    check_private_place(tmp_path)  # of the user's group, in which nobody else is
    monkeypatch.setattr(
        ownership.grp, "getgrgid", lambda _: grp.struct_group(("staff", "x", 1, []))
    )
    with pytest.raises(InputError, match="can be written by others"):
        check_private_place(tmp_path)


def test_a_cache_that_does_not_keep_owners(demo, tokenizer, tmp_path, monkeypatch) -> None:
    """As a network file system that gives root's files to nobody."""
    monkeypatch.setattr(entry, "is_own_folder", lambda _: False)
    with pytest.raises(InputError, match=r"cannot write the cache .* set SUPERBERT_CACHE"):
        load(demo, tokenizer, tmp_path)


def test_the_demo_corpus_of_others_is_not_read(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SUPERBERT_CACHE", str(tmp_path))
    folder = data_folder(Recipe(tasks={"sst": {"head": "single"}}, train=("sst",)))
    folder.chmod(0o777)
    with pytest.raises(InputError, match=r"the demo corpus is not read from .* remove it"):
        data_folder(Recipe(tasks={"sst": {"head": "single"}}, train=("sst",)))
