"""Files of an object store (S3), which a server on this machine stands for."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from engine.data import cache as cache_module
from engine.data import prepare
from engine.data.addresses import Address, opened
from engine.data.cache import Reading, load_split
from engine.data.origins import DataFiles
from engine.data.source import TaskSource
from engine.data.table import Table
from engine.data.tokenizer import Tokenizer
from engine.train import main
from engine.utils.errors import InputError

from ..conftest import TINY
from .test_pieces import cut
from .written import COMPRESS, source

moto_server = pytest.importorskip(
    "moto.server", reason="moto, which stands for S3, is not installed (pip install moto[server])"
)
s3fs = pytest.importorskip(
    "s3fs", reason="s3fs, which reads s3://, is not installed (pip install s3fs)"
)

WORDS = Tokenizer.train(["film dull 0 1 2"] * 3, 60)
HEADER = "text,label\n"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        running = moto_server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
        running.stop()


@pytest.fixture
def store(server: str, request: pytest.FixtureRequest) -> Any:
    """A store with an empty bucket ``texts``."""
    s3fs.S3FileSystem.clear_instance_cache()
    system = s3fs.S3FileSystem()
    if system.exists("texts"):
        system.rm("texts", recursive=True)
    system.mkdir("texts")
    system.invalidate_cache()
    return system


def write(store: Any, **contents: str | bytes) -> None:
    for name, content in contents.items():
        whole = content if isinstance(content, bytes) else content.encode()
        store.pipe(f"texts/data/{name.replace('_', '.')}", whole)


def read(one: TaskSource) -> Table:
    found = one.origin("t", "train", None)
    return found.table(one.format("t"), labelled=True, on_bad_row="error")


def test_a_pattern(store: Any, tmp_path: Path) -> None:
    write(
        store,
        a_csv=HEADER + "film 0,1\n",
        b_csv_gz=COMPRESS["gzip"]((HEADER + "film 1,0\n").encode()),
        c_jsonl='{"text": "film 2", "label": 1}\n',
    )
    one = source(files={"train": "s3://texts/data/*"})
    found = one.origin("t", "train", None)
    assert isinstance(found, DataFiles)
    assert [str(file.path) for file in found.files] == [
        f"s3://texts/data/{name}" for name in ("a.csv", "b.csv.gz", "c.jsonl")
    ]
    assert read(one).sentences == (["film 0", "film 1", "film 2"],)
    assert found.digest() == one.origin("t", "train", None).digest()
    form, cache = one.format("t"), tmp_path / "cache"
    assert len(load_split(found, form, WORDS, 16, cache=cache)) == 3
    assert len(load_split(one.origin("t", "train", None), form, WORDS, 16, cache=cache)) == 3
    assert len(list(cache.iterdir())) == 1
    write(store, a_csv=HEADER + "film 0,1\nfilm 9,0\n")
    assert len(load_split(one.origin("t", "train", None), form, WORDS, 16, cache=cache)) == 4
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("pattern", ["a.csv", "*"])
def test_another_program_changes_a_file_while_it_is_read(
    store: Any, tmp_path: Path, monkeypatch, pattern: str
) -> None:
    write(store, a_csv=HEADER + "film 0,1\n", b_csv=HEADER + "film 1,1\n")
    s3fs.S3FileSystem.clear_instance_cache()
    one = source(files={"train": f"s3://texts/data/{pattern}"})
    found = one.origin("t", "train", None)
    original = cache_module.prepared

    def disturbed(*given: object) -> object:
        for piece in original(*given):
            yield piece
            other = s3fs.S3FileSystem(skip_instance_cache=True)
            other.pipe("texts/data/a.csv", (HEADER + "film 9,1\n").encode())

    monkeypatch.setattr(cache_module, "prepared", disturbed)
    with pytest.raises(InputError, match=r"changed while it was read, s3://texts/data/a\.csv"):
        load_split(found, one.format("t"), WORDS, 16, cache=tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


def test_parquet(store: Any) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"text": ["film 0", "dull"], "label": [1, 0]})
    with store.open("texts/data/f.parquet", "wb") as file:
        parquet.write_table(table, file)
    assert read(source(files={"train": "s3://texts/data/f.parquet"})).sentences == (
        ["film 0", "dull"],
    )


def test_a_large_file_is_read_piece_by_piece(store: Any, tmp_path: Path, monkeypatch) -> None:
    rows = [f"film {number % 3},{number % 2}\n" for number in range(20_000)]
    write(store, f_csv=HEADER + "".join(rows))
    monkeypatch.setattr(prepare, "_HERE", 1)
    cut(monkeypatch, 1 << 14)
    one = source(files={"train": "s3://texts/data/f.csv"})
    form = one.format("t")
    cache = tmp_path / "cache"
    split = load_split(
        one.origin("t", "train", None), form, WORDS, 16, cache=cache, reading=Reading(2)
    )
    assert len(split) == 20_000
    assert split.labels.tolist() == [0, 1] * 10_000


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://texts/none.csv", "no such file, s3://texts/none.csv"),
        ("s3://texts/none-*.csv", r"no file is called like s3://texts/none-\*.csv"),
        ("s3://nowhere/none.csv", "s3://nowhere/none.csv"),
        ("s3://nowhere/*.csv", r"s3://nowhere/\*.csv"),
        ("s3://texts", "s3://texts"),
    ],
)
def test_addresses_that_stand_for_nothing(store: Any, address: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        read(source(files={"train": address}))
    assert "\n" not in str(error.value)


def test_a_server_that_is_gone(store: Any, monkeypatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=r"cannot read a file: .*s3://texts/f.csv") as error:
        read(source(files={"train": "s3://texts/f.csv"}))
    assert "\n" not in str(error.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_file_that_goes_while_it_is_read(store: Any) -> None:
    write(store, f_csv=b"x" * (64 << 20))  # more than is read ahead
    with opened(Address("s3://texts/data/f.csv")) as file:
        assert file.read(10) == b"x" * 10
        store.rm("texts/data/f.csv")
        with pytest.raises(InputError, match=r"cannot read a file: .*s3://texts/data/f.csv"):
            list(iter(partial(file.read, 1 << 20), b""))


def test_a_run(store: Any, tmp_path: Path) -> None:
    rows = "".join(f"film {number},{number % 2}\n" for number in range(40))
    write(store, train_csv=HEADER + rows, dev_csv=HEADER + rows)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
train = ["t"]
batch_size = 4
[tasks.t]
head = "single"
[tasks.t.source]
kind = "classification"
text = ["text"]
classes = 2
files = { train = "s3://texts/data/train.*", dev = "s3://texts/data/dev.csv" }
"""
    )
    out = tmp_path / "run"
    assert main([str(recipe), "--out", str(out), "--max-steps", "2", "--set", *TINY]) == 0
    assert os.path.isfile(out / "metrics.json")
