"""Compressed files: read as if they were not, damaged ones and bombs refused in one line."""

import io
import itertools
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from engine.data import decompress, raw_text
from engine.data.blocks import blocks_of
from engine.data.raw_text import lines_of
from engine.utils.errors import InputError

from .written import COMPRESS, COMPRESSIONS, ENDINGS, FOUND_OUT, GOOD, read, refuse


def test_parquet_in_a_compressed_file_with_a_repeated_column() -> None:
    table = pa.table([["fine"], [1], ["x"], ["y"]], names=["text", "label", "more", "more"])
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    content = COMPRESS["gzip"](stream.getvalue())
    assert read(content, "f.parquet.gz").sentences == (["fine"],)


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_compressed_file_that_is_damaged(kind: str) -> None:
    rows = "".join(f"row {number},1\n" for number in range(300))
    content = COMPRESS[kind](f"text,label\n{rows}".encode())
    name = f"f.csv{ENDINGS[kind]}"
    assert len(read(content, name)) == 300
    assert len(read(content + COMPRESS[kind](rows.encode()), name)) == 600  # parts in a row
    for length in range(1, len(content), 7):
        assert refuse(content[:length], name).startswith(f"cannot decompress by {kind}: ")
    assert refuse(content[:10] + b"\xff" * 20 + content[30:], name).count("\n") == 0


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_what_follows_the_first_part_is_not_passed_over(kind: str) -> None:
    """Python's own readers take a damaged second stream of bz2 and xz for the end of the file."""
    first = COMPRESS[kind](b"text,label\n" + b"fine,1\n" * 15)
    second = COMPRESS[kind](b"dull,0\n" * 25)
    name = f"f.csv{ENDINGS[kind]}"
    assert len(read(first + second, name)) == 40
    for damaged in (
        second[:1] + b"\xff" + second[2:],  # how a stream begins
        second[: len(second) // 2],
        b"junk",
        b"PK\3\4",
        b"text,label\n",
    ):
        assert refuse(first + damaged, name).startswith(f"cannot decompress by {kind}: ")
    if kind != "zstd":  # which knows no padding
        assert len(read(first + bytes(8), name)) == 15
        assert len(read(first + bytes(8) + second, name)) == 40


@pytest.mark.parametrize("kind", COMPRESSIONS)
def test_a_small_file_that_grows_out_of_proportion(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(decompress, "ALWAYS_ALLOWED", 3 << 20)
    content = COMPRESS[kind](b"a" * (2 << 20))
    assert "line too long" in refuse(content, "f.tsv" + ENDINGS[kind])  # it is read
    content = COMPRESS[kind](b"a" * (4 << 20))
    if len(content) * decompress.MOST_TIMES < 4 << 20:
        assert "more than 3 MiB" in refuse(content, "f.tsv" + ENDINGS[kind])
    else:
        pytest.fail("it compresses too little to show anything")


def test_without_pyarrow_zstandard_names_what_to_install(monkeypatch) -> None:
    content = COMPRESS["zstd"](GOOD.encode())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert refuse(content, "f.csv.zst") == (
        "f.csv.zst: reading Zstandard needs pyarrow (pip install pyarrow); or decompress it"
    )


def test_text_of_objectives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "fine café\n\ndull\n"
    for encoding, kind in itertools.product(FOUND_OUT, COMPRESS):
        path = tmp_path / f"f.txt{ENDINGS[kind]}"
        path.write_bytes(COMPRESS[kind](lines.encode(encoding)))
        assert lines_of(path).texts == ["fine café", "dull"]
    path = tmp_path / "f.txt"
    path.write_bytes(("dull\r\n" * 5 + lines * 2).encode("latin-1"))
    for size in (1, 20, 1 << 20):
        monkeypatch.setattr(raw_text, "blocks_of", partial(blocks_of, size=size))
        with pytest.raises(InputError) as error:
            lines_of(path)
        reason = f"not UTF-8: byte 0xe9 at 9, {path}:6; convert the file to UTF-8"
        assert str(error.value) == reason
