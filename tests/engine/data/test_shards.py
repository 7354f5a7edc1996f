"""A split of several files: the rows of one that holds all, wherever they are named."""

import os
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.data.cache import load_split
from engine.data.origins import DataFile, DataFiles
from engine.data.table import Table
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from .written import COMPRESS, ENDINGS, source

ROWS = [f"film number {number},{number % 2}\n" for number in range(20)]
HEADER = "text,label\n"


def write_shards(folder: Path) -> list[str]:
    """Three shards, of which one is compressed and one has its columns the other way round."""
    (folder / "parts").mkdir()
    names = ["part-0.csv", f"part-1.csv{ENDINGS['gzip']}", "part-2.tsv"]
    swapped = "label\ttext\n" + "".join(
        "\t".join(row.strip().split(",")[::-1]) + "\n" for row in ROWS[15:]
    )
    contents = [
        (HEADER + "".join(ROWS[:7])).encode(),
        COMPRESS["gzip"]((HEADER + "".join(ROWS[7:15])).encode()),
        swapped.encode(),
    ]
    for name, content in zip(names, contents, strict=True):
        (folder / "parts" / name).write_bytes(content)
    return [f"parts/{name}" for name in names]


@pytest.mark.parametrize("how", ["list", "pattern", "folder", "mixed"])
def test_the_rows_are_those_of_one_file(tmp_path: Path, how: str) -> None:
    names = write_shards(tmp_path)
    (tmp_path / "parts/.hidden.csv").write_text("")
    (tmp_path / "parts/readme.md").write_text("")
    (tmp_path / "all.csv").write_text(HEADER + "".join(ROWS))
    given = {
        "list": tuple(names),
        "pattern": "parts/part-*",
        "folder": "parts",
        "mixed": (names[0], "parts/part-[12].*", "parts"),
    }[how]
    one = source(files={"train": given})
    found = one.origin("t", "train", tmp_path)
    assert isinstance(found, DataFiles)
    form = one.format("t")
    whole = DataFile(tmp_path / "all.csv").table(form, labelled=True, on_bad_row="error")
    table = found.table(form, labelled=True, on_bad_row="error")
    assert (table.ids, table.sentences) == (whole.ids, whole.sentences)
    assert table.labels.tolist() == whole.labels.tolist()
    words = Tokenizer.train(["film number 0 1 2"] * 3, 60)
    split = load_split(found, form, words, 16, cache=tmp_path / "cache")
    assert len(split) == 20
    assert split.labels.tolist() == whole.labels.tolist()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none-*.csv", "tasks.t.source.files.train: no file is called like .*none"),
        ("empty", "tasks.t.source.files.train: no file in .* ends as those"),
        ("missing.csv", "cannot read a file: no such file or directory, .*missing.csv"),
    ],
)
def test_names_that_stand_for_nothing(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    one = source(files={"train": ("good.csv", name)})
    (tmp_path / "good.csv").write_text(HEADER + ROWS[0])
    with pytest.raises(InputError, match=message):
        one.origin("t", "train", tmp_path).table(one.format("t"), labelled=True, on_bad_row="error")


def test_a_shard_with_other_columns_is_named(tmp_path: Path) -> None:
    names = write_shards(tmp_path)
    (tmp_path / names[0]).write_text("texts,label\nfine,1\n")
    one = source(files={"train": "parts"})
    with pytest.raises(InputError, match=r"no column 'text' in the header, .*part-0.csv:1"):
        one.origin("t", "train", tmp_path).table(one.format("t"), labelled=True, on_bad_row="error")


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "rows[1].csv").write_text(HEADER + ROWS[0])
    assert isinstance(
        source(files={"train": "rows[1].csv"}).origin("t", "train", tmp_path), DataFile
    )


def read(folder: Path, *, on_bad_row: str = "error", **fields: object) -> Table:
    one = source(**({"files": {"train": "parts"}} | fields))
    found = one.origin("t", "train", folder)
    return found.table(one.format("t"), labelled=True, on_bad_row=on_bad_row)


def put(folder: Path, **contents: str | bytes) -> None:
    """Files of a folder ``parts``; ``a_csv`` is called ``a.csv``."""
    (folder / "parts").mkdir(exist_ok=True)
    for name, content in contents.items():
        path = folder / "parts" / name.replace("_", ".")
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


ONE = HEADER + ROWS[0]


def test_a_bad_row_is_named_by_its_file_and_its_own_line(tmp_path: Path) -> None:
    bad = HEADER + ROWS[1] + "dull,7\n"
    put(tmp_path, a_csv=HEADER + "".join(ROWS), b_csv=bad, c_csv=ONE)
    with pytest.raises(InputError, match=r"label is outside .*parts/b\.csv:3; "):
        read(tmp_path)
    table = read(tmp_path, on_bad_row="skip")
    assert len(table) == 22
    assert table.bad_rows == {"label is outside 0 to 1": 1}
    assert table.first_bad.endswith("parts/b.csv:3; correct the row")
    assert table.ids[-2:] == ["20", "22"]  # numbered over all


def test_the_same_of_other_formats(tmp_path: Path) -> None:
    put(
        tmp_path,
        a_jsonl='{"text": "fine", "label": 1}\n' * 5,
        b_jsonl='{"text": "dull", "label": 0}\n{}\n',
    )
    with pytest.raises(InputError, match=r"parts/b\.jsonl:2"):
        read(tmp_path, on_bad_row="error", files={"train": ("parts/a.jsonl", "parts/b.jsonl")})
    table = pa.table({"text": ["fine", None], "label": [1, 0]})
    parquet.write_table(table, tmp_path / "parts/c.parquet")
    with pytest.raises(InputError, match=r"no value in column 'text', .*c\.parquet, row 1"):
        read(tmp_path, files={"train": ("parts/a.jsonl", "parts/c.parquet")})


def test_when_no_row_is_usable(tmp_path: Path) -> None:
    put(tmp_path, a_csv=HEADER + "x,9\n", b_csv=HEADER + "y,9\n")
    with pytest.raises(InputError, match=r"no usable row .*a\.csv and 1 more files; the first: ."):
        read(tmp_path, on_bad_row="skip")


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("kind", ["nothing", "blank", "header", "gzip"])
def test_an_empty_file_among_others(tmp_path: Path, name: str, kind: str) -> None:
    """As programs write that have fewer rows than files."""
    contents = {f"{other}_csv": ONE for other in "abc"}
    empty = {"nothing": "", "blank": "\n\n", "header": HEADER, "gzip": COMPRESS["gzip"](b"")}[kind]
    del contents[f"{name}_csv"]
    put(tmp_path, **contents, **{f"{name}_csv{'_gz' * (kind == 'gzip')}": empty})
    table = read(tmp_path)
    assert len(table) == 2
    found = f"{name}.csv{'.gz' * (kind == 'gzip')}"
    note = (f"files with an empty one among them ({found})",)
    assert table.notes == (() if kind == "header" else note)


def test_files_that_are_all_empty(tmp_path: Path) -> None:
    put(tmp_path, a_csv="", b_csv="")
    with pytest.raises(InputError, match=r"no usable row, .*a\.csv and 1 more files; give a file"):
        read(tmp_path)
    with pytest.raises(InputError, match=r"empty file, .*a\.csv; give one with rows"):
        read(tmp_path, files={"train": "parts/a.csv"})


def test_notes_name_their_files(tmp_path: Path) -> None:
    tabs = ONE.replace(",", "\t")
    put(tmp_path, a_csv=ONE, b_csv=tabs, c_csv=tabs, d_csv="", e_csv="", f_csv=tabs)
    assert read(tmp_path).notes == (
        "separated by tabs, as its header is, not by commas (b.csv and 2 more)",
        "files with an empty one among them (d.csv and 1 more)",
    )


def test_a_header_that_differs(tmp_path: Path) -> None:
    put(tmp_path, a_csv=ONE, b_csv="text,rating\nfine,1\n")
    with pytest.raises(InputError, match=r"no column 'label' in the header, .*parts/b\.csv:1"):
        read(tmp_path)


def test_each_file_has_its_own_way_of_writing(tmp_path: Path) -> None:
    other = "label,more,text\r\n1,x,fine\r\n"
    put(tmp_path, a_csv=ONE, b_csv=b"\xef\xbb\xbf" + ONE.encode(), c_csv=ONE.encode("utf-16"))
    put(tmp_path, d_csv=other, e_jsonl='{"text": "fine", "label": 1}\n')
    table = read(tmp_path)
    assert table.labels.tolist() == [0, 0, 0, 1, 1]
    assert table.notes == ("UTF-16-LE, by its byte order mark (c.csv)",)


BROKEN = {
    "b.csv.gz": (COMPRESS["gzip"](ONE.encode() * 2000)[:-30], "cannot decompress by gzip"),
    "b.parquet": (b"PAR1nothing", "not a readable Parquet file"),
    "b.csv": (b"text,label\n\xff\xfe,1\n", "not UTF-8"),
    "b.jsonl": (b"[", "not JSON"),
    "b.json": (b"[{]", "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    content, reason = BROKEN[name]
    put(tmp_path, a_csv=ONE, c_csv=ONE)
    (tmp_path / "parts" / name).write_bytes(content)
    for on_bad_row in ("error", "skip") if "compress" in reason or "Par" in reason else ("error",):
        with pytest.raises(InputError, match=reason) as error:
            read(tmp_path, on_bad_row=on_bad_row)
        assert f"parts/{name}" in str(error.value)
        assert "\n" not in str(error.value)


def test_a_folder_and_a_link_to_nothing_among_the_files(tmp_path: Path) -> None:
    put(tmp_path, a_csv=ONE)
    (tmp_path / "parts/old.csv").mkdir()
    (tmp_path / "parts/old.csv/f.csv").write_text(ONE)
    assert len(read(tmp_path)) == 1
    assert len(read(tmp_path, files={"train": "parts/*"})) == 1
    assert len(read(tmp_path, files={"train": "parts/**"})) == 2
    (tmp_path / "parts/gone.csv").symlink_to("nowhere.csv")
    with pytest.raises(InputError, match=r"no such file or directory, .*parts/gone\.csv"):
        read(tmp_path)


def test_a_pattern_that_only_folders_match(tmp_path: Path) -> None:
    (tmp_path / "one.csv").mkdir()
    with pytest.raises(InputError, match=r"no file is called like .*\*\.csv; correct the pattern"):
        read(tmp_path, files={"train": "*.csv"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all files")
def test_a_file_without_permission(tmp_path: Path) -> None:
    put(tmp_path, a_csv=ONE, b_csv=ONE)
    (tmp_path / "parts/b.csv").chmod(0)
    with pytest.raises(InputError, match=r"permission denied, .*parts/b\.csv"):
        read(tmp_path)


def test_each_file_is_read_once(tmp_path: Path) -> None:
    put(tmp_path, a_csv=ONE, b_csv=ONE)
    names = ("parts/b.csv", "parts/*.csv", "parts", "./parts/a.csv", str(tmp_path / "parts/a.csv"))
    table = read(tmp_path, files={"train": names})
    assert len(table) == 2


def test_a_data_folder_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "run [1] *"
    folder.mkdir()
    put(folder, a_csv=ONE, b_csv=ONE)
    assert len(read(folder, files={"train": "parts/[ab].csv"})) == 2
    assert len(read(folder)) == 2


@pytest.mark.parametrize("name", ["", " ", "a\nb.csv"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ValueError, match="files"):
        source(files={"train": ("good.csv", name)})


def test_not_all_files_are_held_in_memory(tmp_path: Path) -> None:
    for part in range(20):
        put(tmp_path, **{f"{part}_csv": HEADER + "a fine film indeed,1\n" * 50_000})
    one = source(files={"train": "parts"})
    found = one.origin("t", "train", tmp_path)
    tracemalloc.start()
    try:
        found.digest()
        with found.rows(one.format("t"), labelled=True) as rows:
            assert sum(piece.num_rows for piece in rows.pieces) == 1_000_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 12 << 20  # of 20 MiB; a block and its lines
