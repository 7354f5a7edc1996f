"""An entry of the cache: a folder with the arrays of a split, which grow as pieces come in.

``index.json`` has the size and the hashes of every file.  Those of small files are checked when an
entry is opened; of large ones samples are, or all with ``verify``.
"""

import io
import os
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy

from ..utils.files import sync
from ..utils.fingerprint import digest, is_large, sample_digest
from ..utils.json_text import dump_json
from ..utils.ownership import is_own_folder
from ..utils.untrusted_io import parse_json
from .split import TokenizedSplit, split_of
from .tokenized import ARRAYS, TEXT_KEYS, Array, Totals, text_ids

_INDEX, _META, _TEXT_IDS = "index.json", "meta.json", "text_ids"
_STORED = (*(name for name in ARRAYS if name != TEXT_KEYS), _TEXT_IDS, "texts")
_TEXT, _ABOUT = "text", "about.json"
_FILES = {_META, _TEXT, _ABOUT, *(f"{name}.npy" for name in _STORED)}


class DamagedEntryError(Exception):
    """A missing or damaged entry."""


class _Growing(NamedTuple):
    """An array's file, and what its rows are."""

    file: IO[bytes]
    dtype: np.dtype[Any]
    row: tuple[int, ...]
    rows: int

    def header(self) -> bytes:
        """Return the file's beginning, of the same size for any number of rows."""
        described = {
            "descr": npy.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.rows, *self.row),
        }
        stream = io.BytesIO()
        npy.write_array_header_1_0(stream, described)
        return stream.getvalue()


class EntryWriter:
    """Writes the arrays of an entry; use it in a ``with`` statement.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._growing: dict[str, _Growing] = {}
        self._open = ExitStack()

    def append(self, name: str, array: Array) -> None:
        """Add rows to an array.

        Args:
            name: one of ARRAYS.
            array: its rows; all times of one dtype, and of rows of one shape.

        Raises:
            OSError: the system refuses it.
        """
        if name not in self._growing:
            file = self._open.enter_context((self.folder / f"{name}.npy").open("xb", 1 << 20))
            self._growing[name] = _Growing(file, array.dtype, array.shape[1:], 0)
            file.write(self._growing[name].header())
        known = self._growing[name]
        assert (array.dtype, array.shape[1:]) == (known.dtype, known.row), name
        known.file.write(np.ascontiguousarray(array).data)
        self._growing[name] = known._replace(rows=known.rows + len(array))

    def finish(self, task: str, totals: Totals, notes: tuple[str, ...], data: str) -> None:
        """Write what belongs to the arrays of a split, when all rows are there.

        Args:
            task: the task's name.
            totals: what is counted over the pieces.
            notes: what was found out about the file, a phrase each.
            data: the name of the file, for those who look at the cache.
        """
        self._complete()
        if TEXT_KEYS in self._growing:
            keys = self.folder / f"{TEXT_KEYS}.npy"
            ids = text_ids(np.load(keys, mmap_mode="r")).reshape(totals.examples, -1)
            np.save(self.folder / f"{_TEXT_IDS}.npy", ids)
            keys.unlink()
        meta = {"task": task, "totals": totals._asdict(), "notes": notes}
        (self.folder / _META).write_text(dump_json(meta), encoding="utf-8")
        _write_index(self.folder, data, f"tokens of {totals.rows:,} rows of {task}")

    def finish_arrays(self, data: str, what: str, said: Mapping[str, Any]) -> None:
        """Write what belongs to arrays that are no split's, when all rows are there.

        Args:
            data: the name of what they were made from, for those who look at the cache.
            what: they are, for the same.
            said: what :func:`open_arrays` gives back with them.
        """
        self._complete()
        (self.folder / _META).write_text(dump_json(dict(said)), encoding="utf-8")
        _write_index(self.folder, data, what)

    def _complete(self) -> None:
        for growing in self._growing.values():
            growing.file.seek(0)
            growing.file.write(growing.header())
        self._open.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the files."""
        self._open.close()


def open_entry(entry: Path, *, verify: bool = False) -> TokenizedSplit:
    """Open an entry with a split, memory-mapped; as of :func:`check_entry`."""
    arrays, meta = open_arrays(entry, verify=verify)
    try:
        totals = Totals(**meta["totals"])
        totals = totals._replace(blank=tuple(totals.blank))
        return split_of(meta["task"], totals, arrays, meta["notes"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedEntryError(str(error)) from error


def open_arrays(entry: Path, *, verify: bool = False) -> tuple[dict[str, Array], dict[str, Any]]:
    """Open the arrays of an entry, memory-mapped, and what is said of them.

    As of :func:`check_entry`.
    """
    index = check_entry(entry, verify=verify)
    try:
        said = parse_json((entry / _META).read_bytes())
        arrays = {
            name: np.load(entry / f"{name}.npy", mmap_mode="r")
            for name in _STORED
            if f"{name}.npy" in index
        }
        return arrays, said
    except (OSError, ValueError, TypeError) as error:
        raise DamagedEntryError(str(error)) from error


def write_text(folder: Path, text: str, data: str, what: str) -> None:
    """Write the one text of an entry into an empty folder.

    Args:
        folder: the folder.
        text: the text.
        data: the name of what it was made from, for those who look at the cache.
        what: it is, for the same.

    Raises:
        OSError: the system refuses it.
    """
    (folder / _TEXT).write_text(text, encoding="utf-8")
    _write_index(folder, data, what)


def read_text(entry: Path) -> str:
    """Return the text of an entry that has one; as of :func:`check_entry`."""
    check_entry(entry)
    try:
        return (entry / _TEXT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise DamagedEntryError(str(error)) from error


def check_entry(entry: Path, *, verify: bool = False) -> Collection[str]:
    """Check an entry, and return the names of its files.

    Args:
        entry: its folder.
        verify: read all of every file, where samples would do.

    Raises:
        DamagedEntryError: it is not there, damaged, or not the user's own.
    """
    try:
        if not is_own_folder(entry):
            raise DamagedEntryError(f"{entry.name} belongs to others, or others can write it")
        index = parse_json((entry / _INDEX).read_bytes())
        if not index.keys() <= _FILES:
            raise DamagedEntryError("the index names other files")
        for name, known in index.items():
            _check(entry / name, known, verify=verify)
        with suppress(OSError):  # a cache that is mounted read-only is as good
            os.utime(entry)  # of its last use
        return list(index)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedEntryError(str(error)) from error


def about(entry: Path) -> tuple[str, str]:
    """Return what an entry was made from and what it is, without a check of its files.

    Raises:
        DamagedEntryError: it does not say.
    """
    try:
        said = parse_json((entry / _ABOUT).read_bytes())
        return str(said["data"]), str(said["what"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedEntryError(str(error)) from error


def _write_index(folder: Path, data: str, what: str) -> None:
    said = {"data": data, "what": what}
    (folder / _ABOUT).write_text(dump_json(said), encoding="utf-8")
    index = dict[str, dict[str, object]]()
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        index[path.name] = {
            "bytes": size,
            "samples": sample_digest(path),
            "sha256": digest(path),
        }
        if is_large(size):  # of which samples are checked, which may miss what a crash lost
            sync(path)
    (folder / _INDEX).write_text(dump_json(index), encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o600)


def _check(path: Path, known: Mapping[str, object], *, verify: bool) -> None:
    if path.stat().st_size != known["bytes"]:
        raise DamagedEntryError(f"{path.name}: of another size")
    found, expected = (
        (digest(path), known["sha256"]) if verify else (sample_digest(path), known["samples"])
    )
    if found != expected:
        raise DamagedEntryError(path.name)
