"""Files read in pieces: the same rows, errors and notes wherever they are cut; in any process."""

from functools import partial
from pathlib import Path

import pytest

from engine.data import decompress, prepare, rows, table, worker_pool
from engine.data.blocks import blocks_of
from engine.data.cache import Reading, load_split
from engine.data.origins import DataFile
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from .written import COMPRESS, ENDINGS, source

HEADER = "text,label\n"
PLAIN = HEADER + "fine film,1\ndull,0\n" * 9
QUOTED = HEADER + 'fine,1\n"a ""long""\nline\r\nor two, here",0\n"b\n",1\ndull,0\n' * 5
FILES = {
    "plain.csv": PLAIN,
    "quoted.csv": QUOTED,
    "ends.csv": HEADER + "fine,1\r\ndull,0\r\n\r\n\n\n",
    "return.csv": HEADER + "fine,1\rdull,0\r" * 5,
    "broken.csv": HEADER + "fine,1\n" * 9 + 'x,"y\n',
    "bad.csv": HEADER + "fine,1\n,1\ndull,9\nfine\n\nfine,1\n" * 3,
    "bad.tsv": "text\tlabel\nfine\t1\n\t1\n\ndull\t0\n\n" * 3,
    "bytes.tsv": b"text\tlabel\nfine\t1\ncaf\xe9\t1\nna\xc3\xafve\t0\n" * 3,
    "wide.csv": PLAIN.replace("film", "f\u00eate \U0001f600").encode("utf-16"),
    "header.csv": HEADER,
    "empty.csv": "\n\r\n \n",
    "rows.jsonl": '{"text": "fine", "label": 1}\n{"text": "d\u00fcll", "label": 0}\nx\n\n' * 4,
    "rows.json": '\n[{"text": "fine", "label": 1},\n{"text": "dull", "label": 0}]\n',
    "array.jsonl": '[{"text": "fine", "label": 1}]\n',
}


def outcome(path: Path, on_bad_row: str) -> object:
    """What is read, or the error's line."""
    form = source().format("t")
    try:
        found = DataFile(path).table(form, labelled=True, on_bad_row=on_bad_row)
    except InputError as error:
        return str(error)
    return (
        found.ids,
        found.sentences,
        found.labels.tolist(),
        found.bad_rows,
        found.blank,
        found.notes,
    )


def write(folder: Path, name: str) -> Path:
    content, path = FILES[name], folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cut(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Read files by so few bytes and characters."""
    monkeypatch.setattr(decompress, "_CHUNK", max(size, 8))  # a beginning tells compressions
    monkeypatch.setattr(table, "blocks_of", partial(blocks_of, size=size))
    monkeypatch.setattr(rows, "_ROWS_OF_A_PIECE", size)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("on_bad_row", ["error", "skip", "blank"])
def test_rows_are_the_same_wherever_a_file_is_cut(tmp_path, monkeypatch, name, on_bad_row) -> None:
    path = write(tmp_path, name)
    whole = outcome(path, on_bad_row)
    for size in (1, 2, 3, 7, 20, 64):
        with monkeypatch.context() as patch:
            cut(patch, size)
            assert outcome(path, on_bad_row) == whole


@pytest.mark.parametrize("kind", COMPRESS)
def test_compressed_files_too(tmp_path, monkeypatch, kind) -> None:
    path = tmp_path / f"f.csv{ENDINGS[kind]}"
    path.write_bytes(COMPRESS[kind](QUOTED.encode()) + COMPRESS[kind](b"more,1\n" * 30))
    whole = outcome(path, "error")
    assert len(whole[0]) == 50
    for size in (1, 5, 33):
        with monkeypatch.context() as patch:
            cut(patch, size)
            assert outcome(path, "error") == whole


def entry_of(path: Path, cache: Path, workers: int, **how: object) -> dict[str, bytes]:
    """The files of the entry that a file makes."""
    form = source(path.name).format("t")
    words = Tokenizer.train(["fine film dull long line here two"] * 3, 60)
    load_split(DataFile(path), form, words, 16, cache=cache, reading=Reading(workers), **how)
    (entry,) = cache.iterdir()
    return {file.name: file.read_bytes() for file in entry.iterdir()}


@pytest.mark.parametrize("name", ["plain.csv", "quoted.csv", "bad.csv", "wide.csv", "bytes.tsv"])
def test_the_cache_is_the_same_whatever_the_workers(tmp_path, monkeypatch, name) -> None:
    path = write(tmp_path, name)
    how = {"on_bad_row": "skip"}
    whole = entry_of(path, tmp_path / "whole", 1, **how)
    cut(monkeypatch, 2)
    monkeypatch.setattr(prepare, "_HERE", 1)
    for workers in (1, 2, 5):
        assert entry_of(path, tmp_path / str(workers), workers, **how) == whole


@pytest.mark.parametrize("name", ["bad.csv", "broken.csv"])
def test_the_first_error_of_the_file_is_told_whatever_the_workers(
    tmp_path, monkeypatch, name
) -> None:
    path = write(tmp_path, name)
    message = outcome(path, "error")
    cut(monkeypatch, 1)
    monkeypatch.setattr(prepare, "_HERE", 0)
    for workers in (1, 3):
        with pytest.raises(InputError) as error:
            entry_of(path, tmp_path / str(workers), workers)
        assert str(error.value) == message
        assert list((tmp_path / str(workers)).iterdir()) == []


def test_a_killed_worker_is_one_line(tmp_path, monkeypatch) -> None:
    path = write(tmp_path, "plain.csv")
    cut(monkeypatch, 1)
    monkeypatch.setattr(prepare, "_HERE", 0)
    monkeypatch.setattr(
        worker_pool.WorkerPool, "_send", lambda pool, worker, _: pool._workers[worker].kill()
    )
    with pytest.raises(InputError, match=r"a process that tokenizes ended \(SIGKILL\)"):
        entry_of(path, tmp_path / "cache", 2)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\r\n", "\r"])
def test_line_ends_at_the_end_are_looked_at_once(monkeypatch, end: str) -> None:
    """However many: their pieces are waited with."""
    looked_at = 0

    class Watched(str):
        def rstrip(self, *signs: str) -> str:
            nonlocal looked_at
            looked_at += len(self)
            return super().rstrip(*signs)

    many = 3000
    pieces = [Watched("a\nb"), *[Watched(end * 10)] * many]
    (block,) = blocks_of(pieces, Path("f"), size=8)
    assert block.text == "a\nb"
    assert looked_at < 2 * 10 * many * len(end)
    several = list(blocks_of([*pieces, Watched("c")], Path("f"), size=8))
    assert "\n".join(block.text for block in several) == "".join(pieces) + "c"
    if end != "\r":
        assert max(len(block.text) for block in several) < 100
    first = 1
    for block in several:
        assert block.first_line == first
        first += block.num_lines
