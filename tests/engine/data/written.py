"""Files as people write them, read through a source of a recipe."""

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pytest

from engine.data.source import TaskSource
from engine.data.table import Table, parse_table
from engine.utils.errors import InputError

COMPRESS = {
    "none": bytes,
    "gzip": lambda content: gzip.compress(content, 1, mtime=0),
    "bz2": bz2.compress,
    "xz": lambda content: lzma.compress(content, preset=0),
    "zstd": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}
COMPRESSIONS = [kind for kind in COMPRESS if kind != "none"]
ENDINGS = {"none": "", "gzip": ".gz", "bz2": ".bz2", "xz": ".xz", "zstd": ".zst"}
FOUND_OUT = ("utf-8", "utf-8-sig", "utf-16", "utf-32")
"""Encodings that need no field."""

GOOD = "text,label\nfine,1\n"
GZIP = COMPRESS["gzip"](GOOD.encode())
LATIN = "text,label\nfine,1\ncafé,1\n".encode("latin-1")


def source(name: str = "f.csv", **fields: object) -> TaskSource:
    good = {"kind": "classification", "text": ("text",), "classes": 2, "files": {"train": name}}
    return TaskSource(**(good | fields))


def read(content: bytes, name: str = "f.csv", on_bad_row: str = "error", **fields) -> Table:
    form = source(name, **fields).format("t")
    return parse_table(content, Path(name), form, on_bad_row=on_bad_row)


def refuse(content: bytes, name: str = "f.csv", **fields: object) -> str:
    with pytest.raises(InputError) as error:
        read(content, name, **fields)
    return str(error.value)
