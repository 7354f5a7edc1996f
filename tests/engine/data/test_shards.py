"""A split of several files: the rows of one that holds all, wherever they are named."""

from pathlib import Path

import pytest

from engine.data.cache import load_split
from engine.data.source import DataFile, DataFiles
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
