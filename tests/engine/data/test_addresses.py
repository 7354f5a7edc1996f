"""Files at addresses: an object store on this machine, and a server of files."""

import functools
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from engine.data import addresses
from engine.data.addresses import Address, fingerprint
from engine.data.cache import load_split
from engine.data.origins import DataFile, DataFiles
from engine.data.source import TaskSource
from engine.data.table import Table
from engine.data.tokenizer import Tokenizer
from engine.utils.errors import InputError

from .written import COMPRESS, source

PARTS = [f"text,label\nfilm {part},1\ndull {part},0\n".encode() for part in range(3)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server of the folder ``served``."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's store in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def read(one: TaskSource, folder: Path | None = None) -> Table:
    found = one.origin("t", "train", folder)
    return found.table(one.format("t"), labelled=True, on_bad_row="error")


def test_a_pattern_of_a_store(store, tmp_path: Path) -> None:
    for part, content in enumerate(PARTS):
        store.pipe(f"/data/part-{part}.csv", content)
    one = source(files={"train": "memory://data/part-*.csv"})
    found = one.origin("t", "train", None)
    assert isinstance(found, DataFiles)
    assert found.name == "part-0.csv and 2 more"
    assert read(one).sentences == (["film 0", "dull 0", "film 1", "dull 1", "film 2", "dull 2"],)
    words = Tokenizer.train(["film dull 0 1 2"] * 3, 60)
    for rows in (6, 7):
        split = load_split(found, one.format("t"), words, 16, cache=tmp_path / "cache")
        assert len(split) == rows
        store.pipe("/data/part-2.csv", PARTS[2] + b"new,1\n")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("name", ["f.csv", "f.csv.gz", "f.csv?download=1&of=[a]*"])
def test_a_file_of_a_server(server: str, tmp_path: Path, name: str) -> None:
    content = COMPRESS["gzip"](PARTS[0]) if name.endswith("gz") else PARTS[0]
    (tmp_path / "served" / name.partition("?")[0]).write_bytes(content)
    assert read(source(files={"train": f"{server}/{name}"})).sentences == (["film 0", "dull 0"],)


def test_what_tells_that_a_file_has_changed(server: str, store, tmp_path: Path) -> None:
    (tmp_path / "served/f.csv").write_bytes(PARTS[0])
    store.pipe("/f.csv", PARTS[0])
    for url in (f"{server}/f.csv", "memory://f.csv"):
        assert fingerprint(Address(url)) == fingerprint(Address(url))
    before = [fingerprint(Address(url)) for url in (f"{server}/f.csv", "memory://f.csv")]
    (tmp_path / "served/f.csv").write_bytes(PARTS[0][::-1])
    store.pipe("/f.csv", PARTS[0][::-1])
    after = [fingerprint(Address(url)) for url in (f"{server}/f.csv", "memory://f.csv")]
    assert before[0] != after[0]
    assert before[1] != after[1]


@pytest.mark.parametrize(
    "chain",
    [
        "zip://in/part-{}.csv::memory://parts.zip",
        "simplecache::zip://in/part-{}.csv::memory://parts.zip",
        "simplecache::memory://data/part-{}.csv",
    ],
)
def test_chains_of_addresses(store, tmp_path: Path, chain: str) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for part, text in enumerate(PARTS):
            archive.writestr(f"in/part-{part}.csv", text)
            store.pipe(f"/data/part-{part}.csv", text)
    store.pipe("/parts.zip", content.getvalue())
    assert read(source(files={"train": chain.format(1)})).sentences == (["film 1", "dull 1"],)
    one = source(files={"train": chain.format("*")})
    found = one.origin("t", "train", None)
    assert isinstance(found, DataFiles)
    assert found.name == "part-0.csv and 2 more"
    assert read(one).sentences[0][::2] == ["film 0", "film 1", "film 2"]
    assert found.digest() == one.origin("t", "train", None).digest()


def test_all_of_a_file_is_read_where_that_is_asked_for(store, monkeypatch) -> None:
    monkeypatch.setattr(addresses, "fingerprint", lambda _: "what a store says")
    store.pipe("/f.csv", PARTS[0])
    one = DataFile(Address("memory://f.csv"))
    before = [one.digest(), one.digest(verify=True)]
    store.pipe("/f.csv", PARTS[1])
    assert one.digest() == before[0]
    assert one.digest(verify=True) != before[1]
    store.pipe("/f.csv", PARTS[0])
    assert one.digest(verify=True) == before[1]
    store.rm("/f.csv")
    with pytest.raises(InputError, match=r"no such file, memory://f\.csv"):
        one.digest(verify=True)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("zip://none.csv::memory://none.zip", "no such file, zip://none.csv::memory://none.zip"),
        ("zip://a.csv::parts.zip", r"train: zip://a\.csv::parts\.zip ends in a relative path"),
        ("memory://none.csv", "cannot read a file: no such file, memory://none.csv"),
        ("memory://none-*.csv", "tasks.t.source.files.train: no file is called like memory://none"),
        ("nosuch://a/b.csv", "Protocol not known: nosuch, nosuch://a/b.csv"),
        ("http://127.0.0.1:9/f.csv", "cannot read a file: .*http://127.0.0.1:9/f.csv"),
        ("memory://a.parquet", "not a readable Parquet file"),
    ],
)
def test_addresses_that_stand_for_nothing(store, address: str, message: str) -> None:
    store.pipe("/a.parquet", b"text")
    with pytest.raises(InputError, match=message) as error:
        read(source(files={"train": address}))
    assert "\n" not in str(error.value)


def test_what_a_server_says(server: str, tmp_path: Path) -> None:
    """Whoever is refused, or reaches nobody, does not look for a missing file."""
    with pytest.raises(InputError, match=r"no such file, http.*; check the address"):
        read(source(files={"train": f"{server}/nowhere.csv"}))
    with pytest.raises(InputError, match=r"[Cc]annot connect .*; check the address") as found:
        read(source(files={"train": "http://127.0.0.1:1/part.csv"}))
    assert "no such file" not in str(found.value)
    with zipfile.ZipFile(tmp_path / "served" / "parts.zip", "w") as archive:
        archive.writestr("part.csv", PARTS[0] * 100_000)
    with pytest.raises(InputError, match=r"no parts of files, .*zip; copy it to a disk, or to a"):
        read(source(files={"train": f"zip://part.csv::{server}/parts.zip"}))


def test_a_server_that_refuses(tmp_path: Path) -> None:
    class Refusing(_Quiet):
        def do_GET(self) -> None:
            self.send_error(403)

        do_HEAD = do_GET  # noqa: N815

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        with pytest.raises(InputError, match=r"403.*; check the address"):
            read(source(files={"train": f"http://127.0.0.1:{running.server_port}/part.csv"}))
        running.shutdown()
