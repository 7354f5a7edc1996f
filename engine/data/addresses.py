"""Files at an address, such as ``s3://bucket/part-0.parquet``, which the library fsspec opens."""

import glob
import hashlib
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os.path import isabs
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast
from urllib.parse import urlsplit

from ..utils.errors import InputError, first_line
from ..utils.untrusted_io import open_file

_SAMPLES, _SAMPLE, _BLOCK = 16, 64 << 10, 1 << 20
_TELL_CHANGES = (
    *("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated"),
    "CRC",
)
"""What object stores, servers and archives say of a file, by which a change is told."""


@dataclass(frozen=True, slots=True)
class Address:
    """An address of a file; its name and endings are those of a path.

    A chain such as ``zip://part-0.csv::s3://bucket/parts.zip`` has those of the file that is read.
    """

    url: str

    @property
    def _path(self) -> PurePosixPath:
        parts = urlsplit(self._links[1])
        return PurePosixPath(parts.netloc + parts.path)

    @property
    def _links(self) -> tuple[str, str, str]:
        """The link of a chain that names the file, between those before and behind it."""
        links = self.url.split("::")
        place = next((place for place, link in enumerate(links) if is_address(link)), 0)
        before, behind = links[:place], links[place + 1 :]
        return "".join(f"{link}::" for link in before), links[place], "::".join(["", *behind])

    def with_link(self, link: str) -> "Address":
        """Return the address of another file that is reached in the same way."""
        before, _, behind = self._links
        return Address(before + link + behind)

    @property
    def is_pattern(self) -> bool:
        """Whether it may stand for several files; in a server's address ``?`` begins a query."""
        _, link, _ = self._links
        is_server = link.startswith(("http://", "https://"))
        return glob.has_magic(link.partition("?")[0] if is_server else link)

    @property
    def is_relative(self) -> bool:
        """Whether a chain ends in a path that the working folder decides on."""
        last = self.url.rpartition("::")[2]
        return not (is_address(last) or isabs(last))

    @property
    def name(self) -> str:
        """The last part, without a query."""
        return self._path.name

    @property
    def suffix(self) -> str:
        """The last ending."""
        return self._path.suffix

    def with_suffix(self, suffix: str) -> PurePosixPath:
        """Return a path like this, with another last ending."""
        return self._path.with_suffix(suffix)

    def __str__(self) -> str:
        """Return the address."""
        return self.url


Place = Path | Address
"""Where a file of data is."""


def is_address(name: str) -> bool:
    """Return whether a name is an address."""
    return "://" in name


@contextmanager
def opened(place: Place) -> Iterator[IO[bytes]]:
    """Open a file, by its path or at an address, whose methods then raise InputError.

    Raises:
        InputError: it cannot be opened, or the library for such addresses is missing.
    """
    if isinstance(place, Path):
        with open_file(place) as local:
            yield local
        return
    with _explained(place):
        system, path = _system(place)
        remote = system.open(path, "rb")
    with remote:
        yield cast(IO[bytes], _Remote(remote, place))


class _Remote(io.RawIOBase):
    """An open file at an address, for which errors of its store are one line each."""

    def __init__(self, file: IO[bytes], address: Address) -> None:
        super().__init__()
        self._file, self._address = file, address

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        with _explained(self._address):
            return self._file.read(size)

    def seek(self, place: int, whence: int = io.SEEK_SET, /) -> int:
        with _explained(self._address):
            return self._file.seek(place, whence)

    def tell(self) -> int:
        return self._file.tell()


def matching(address: Address) -> list[Address]:
    """Return the files that a pattern in an address stands for, in their order.

    Raises:
        InputError: it cannot be looked for.
    """
    with _explained(address):
        system, path = _system(address)
        found = sorted(system.glob(path, detail=True).items())
        files = [name for name, info in found if info.get("type") != "directory"]
        return [address.with_link(system.unstrip_protocol(name)) for name in files]


def fingerprint(address: Address) -> str:
    """Return what tells a file at an address from others, and from what it was before.

    Its size and what the store says of it (an ETag, its time), or, where that says nothing, some of
    its bytes.

    Raises:
        InputError: it is not there, or cannot be looked at.
    """
    with _explained(address):
        system, path = _system(address)
        info = system.info(path)
        size = info.get("size")
        said = {key: str(info[key]) for key in _TELL_CHANGES if info.get(key) is not None}
        if not said and size:
            last = max(0, size - _SAMPLE)
            starts = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
            said["bytes"] = str([system.cat_file(path, at, at + _SAMPLE) for at in starts])
        return f"{address}:{size}:{sorted(said.items())}"


def digest(address: Address) -> str:
    """Return the SHA-256 of a file at an address, all of which is read.

    Raises:
        InputError: it cannot be read.
    """
    found = hashlib.sha256()
    with opened(address) as file:
        while block := file.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def forget(addresses: Sequence[Address]) -> None:
    """Forget what stores said of files, so that :func:`fingerprint` asks them again.

    Of several files in one folder they are asked at once, where they list folders.

    Raises:
        InputError: a store does not answer.
    """
    folders = dict[str, list[Address]]()
    for address in addresses:
        folders.setdefault(address.url.rpartition("/")[0], []).append(address)
    for files in folders.values():
        with _explained(files[0]):
            system, path = _system(files[0])
            system.invalidate_cache()
        if len(files) > 1:
            with suppress(Exception):  # servers that list nothing are asked for each file
                system.ls(path.rpartition("/")[0], detail=True)


def size_of(address: Address) -> int:
    """Return the bytes of a file at an address; 0 where the store does not say.

    Raises:
        InputError: it is not there, or cannot be looked at.
    """
    with _explained(address):
        system, path = _system(address)
        return int(system.info(path).get("size") or 0)


def _system(address: Address) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise InputError(
            f"{address}: reading addresses needs fsspec (pip install fsspec)"
        ) from None
    system, path = url_to_fs(address.url)
    return system, path


@contextmanager
def _explained(address: Address) -> Iterator[None]:
    """Turn errors of stores, which raise whatever their libraries do, into one line."""
    try:
        yield
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{address}: {first_line(error)}") from None
    except Exception as error:
        reason, advice = _reason(error), "check the address"
        if "range requests" in reason:  # of fsspec, for servers
            reason = "its server sends no parts of files, as Parquet and archives are read"
            advice = "copy it to a disk, or to a server that answers range requests"
        raise InputError(f"cannot read a file: {reason}, {address}; {advice}") from error


def _reason(error: Exception) -> str:
    """Return what an error of a store says, in one line."""
    if isinstance(error, FileNotFoundError):
        # To fsspec a server that does not answer, or refuses to, has no such file either.
        cause = error.__cause__ or error
        is_missing = isinstance(cause, FileNotFoundError)
        if is_missing or getattr(cause, "status", 0) in (404, 410):
            return "no such file"
        return first_line(cause)
    return first_line(error)
