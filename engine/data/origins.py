"""Where examples come from: a file, several files, or a data set's split, loaded or streamed."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from os.path import exists  # unlike pathlib's it raises nothing
from pathlib import Path
from typing import IO, Any

from ..utils.errors import InputError
from ..utils.files import explained
from ..utils.fingerprint import digest, is_large, sample_digest
from ..utils.untrusted_io import file_size, open_file
from . import addresses
from .addresses import Address, Place, opened
from .dialect import endings
from .hf_datasets import check_columns, load_split, records_of, spelling
from .hub_stream import HubStream
from .rows import Piece, Row, Rows, as_pieces, find_columns, typed_row
from .table import EmptyFileError, OnBadRow, Table, collect, file_rows
from .task_schema import TaskSchema


@dataclass(frozen=True)
class DataFile:
    """A file of examples."""

    path: Place
    _seen: list[str] = field(default_factory=list, repr=False, compare=False)
    """What it was like when its digest was asked for last."""

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name

    @property
    def where(self) -> str:
        """What error messages call it."""
        return str(self.path)

    @property
    def files(self) -> "tuple[DataFile, ...]":
        """It alone, as if it were of several."""
        return (self,)

    @property
    def is_missing(self) -> bool:
        """Whether it is known not to be there; of an address that shows when it is read."""
        return isinstance(self.path, Path) and not exists(self.path)

    def _look(self) -> str:
        if isinstance(self.path, Address):
            return addresses.fingerprint(self.path)
        try:
            found = os.stat(self.path)
        except (OSError, ValueError):  # reading it says why
            return ""
        return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"

    def digest(self, *, verify: bool = False, together: int = 1) -> str:
        """Return a hash of all that decides what is read.

        A large file is known by its name, size and time and by samples of it, and one at an address
        by what the store says of it; with ``verify`` by all of it.

        Args:
            verify: read all of it, however large.
            together: how many files it is one of, so that those who are large together count so.

        Raises:
            InputError: it cannot be read.
        """
        found = self._look()
        self._seen[:] = [found]
        if isinstance(self.path, Path):
            with open_file(self.path) as file, explained("read", self.path):
                if verify or not is_large(file_size(file), together):
                    found = digest(self.path)
                else:
                    changed = os.fstat(file.fileno()).st_mtime_ns
                    found = f"{self.name}:{changed}:{sample_digest(self.path, together)}"
        elif verify:
            found = addresses.digest(self.path)
        return f"{''.join(endings(self.path))}:{found}"

    def check_unchanged(self) -> None:
        """Refuse a file that is no longer as it was when its digest was asked for last.

        Raises:
            InputError: it has changed, so that what was read may be half of each.
        """
        _check_unchanged(self.files)

    def _opened(self) -> AbstractContextManager[IO[bytes]]:
        return opened(self.path)

    @contextmanager
    def rows(self, format_: TaskSchema, *, labelled: bool) -> Iterator[Rows]:
        """Open the rows: :func:`~.table.file_rows`."""
        with self._opened() as file:
            with self._explained():
                rows = file_rows(file, self.path, format_, labelled=labelled)
                size = max(1, file_size(file))
            yield rows._replace(
                pieces=self._read(rows.pieces), share=lambda: min(1.0, file.tell() / size)
            )

    def _explained(self) -> AbstractContextManager[None]:
        return explained("read", self.path)

    def _read(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        with self._explained():
            yield from pieces

    def table(self, format_: TaskSchema, *, labelled: bool, on_bad_row: OnBadRow) -> Table:
        """Return the examples: :func:`~.table.collect`."""
        with self.rows(format_, labelled=labelled) as rows:
            return collect(rows, self.where, format_, labelled=labelled, on_bad_row=on_bad_row)


_EMPTY = "files with an empty one among them"


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class DataFiles:
    """Several files of examples, one after the other."""

    files: tuple[DataFile, ...]

    @property
    def name(self) -> str:
        """The first file's name, and how many others there are."""
        return f"{self.files[0].name} and {len(self.files) - 1} more"

    @property
    def where(self) -> str:
        """What error messages call them."""
        return f"{self.files[0].where} and {len(self.files) - 1} more files"

    def digest(self, *, verify: bool = False) -> str:
        """Return a hash of all that decides what is read."""
        together = len(self.files)
        return " ".join(file.digest(verify=verify, together=together) for file in self.files)

    def check_unchanged(self) -> None:
        """Refuse files of which one changed: :meth:`DataFile.check_unchanged`."""
        _check_unchanged(self.files)

    @contextmanager
    def rows(self, format_: TaskSchema, *, labelled: bool) -> Iterator[Rows]:
        """Open the rows, numbered through; a file without a byte is passed over, with a note."""
        notes, share = list[str](), [0.0]

        def pieces() -> Iterator[Piece]:
            first, said = 0, dict[str, list[str]]()
            for number, file in enumerate(self.files):
                try:
                    with file.rows(format_, labelled=labelled) as rows:
                        for piece in rows.pieces:
                            share[0] = (number + rows.share()) / len(self.files)
                            yield piece._replace(first_row=first)
                            first += piece.num_rows
                    found = rows.notes
                except EmptyFileError:
                    found = [_EMPTY]
                for note in found:
                    said.setdefault(note, []).append(file.name)
            notes.extend(f"{note} ({_some(names)})" for note, names in said.items())

        yield Rows(pieces(), notes, lambda: share[0])

    def table(self, format_: TaskSchema, *, labelled: bool, on_bad_row: OnBadRow) -> Table:
        """Return the examples: :func:`~.table.collect`."""
        with self.rows(format_, labelled=labelled) as rows:
            return collect(rows, self.where, format_, labelled=labelled, on_bad_row=on_bad_row)


def _check_unchanged(files: Sequence[DataFile]) -> None:
    addresses.forget([file.path for file in files if isinstance(file.path, Address)])
    for file in files:
        if [file._look()] != file._seen:
            raise InputError(f"changed while it was read, {file.path}; start again when it is done")


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set that the library ``datasets`` loads, from the hub or a folder."""

    name: str
    subset: str
    split: str

    @property
    def where(self) -> str:
        """What error messages call it."""
        return f"data set {self.name}, split {self.split}"

    def digest(self, *, verify: bool = False) -> str:  # noqa: ARG002 -- the library sees to it
        """Return the library's fingerprint of the data."""
        return str(self._data._fingerprint)

    def check_unchanged(self) -> None:
        """Do nothing: what the library has loaded does not change."""

    @contextmanager
    def rows(self, format_: TaskSchema, *, labelled: bool) -> Iterator[Rows]:
        """Open the rows, each a record of the data set."""
        columns = format_.columns(labelled=labelled)
        find_columns(self._data.column_names, columns, self.where)
        lists, objects = format_.list_columns, format_.object_columns
        check_columns(self._data.features, columns, self.where, lists, objects)
        yield Rows(as_pieces(self._rows(format_, columns, self.where)), [])

    def table(self, format_: TaskSchema, *, labelled: bool, on_bad_row: OnBadRow) -> Table:
        """Return the examples: :func:`~.table.collect`."""
        with self.rows(format_, labelled=labelled) as rows:
            return collect(rows, self.where, format_, labelled=labelled, on_bad_row=on_bad_row)

    def _rows(self, format_: TaskSchema, columns: tuple[str, ...], where: str) -> Iterator[Row]:
        data, lists = self._data.select_columns(list(columns)), format_.list_columns
        spelled = spelling(data.features, format_)
        for number, record in enumerate(records_of(data, self.name, self.split)):
            if format_.label in record:
                record[format_.label] = spelled(record[format_.label])
            yield typed_row(
                record, columns, f"{where}, row {number}", lists, format_.object_columns
            )

    @cached_property
    def _data(self) -> Any:
        return load_split(self.name, self.subset, self.split)


Origin = DataFile | DataFiles | HubSplit | HubStream

_PLACE = re.compile("\0([0-9]+)\0")


def without_paths(text: str, origin: Origin) -> str:
    """Return a text on a row with the number of its file in place of the path, for the cache.

    The same content may be read from another path later.
    """
    files = origin.files if isinstance(origin, DataFile | DataFiles) else ()
    for number, file in enumerate(files):
        if f", {file.where}" in text:
            return text.replace(f", {file.where}", f", \0{number}\0")
    return text


def with_names(text: str, origin: Origin) -> str:
    """Return a text on a row with the name of its file in place of the path."""
    for file in origin.files if isinstance(origin, DataFile | DataFiles) else ():
        text = text.replace(f", {file.where}", f", {file.name}")
    return text


def with_paths(text: str, origin: Origin) -> str:
    """Return what :func:`without_paths` was given, with the paths that files have now."""
    files = origin.files if isinstance(origin, DataFile | DataFiles) else ()
    return _PLACE.sub(
        lambda found: files[int(found[1])].where if int(found[1]) < len(files) else "", text
    )
