"""Decompress the content of a file, up to a size that no text needs."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import IO, Any, cast

from ..utils.errors import InputError
from .addresses import Place
from .dialect import AUTO, COMPRESSIONS, Compression, Dialect, endings

_CHUNK = 1 << 20

MOST_TIMES, ALWAYS_ALLOWED = 200, 256 << 20
"""A file may grow to so many times its size, or to so many bytes; text grows five times or so."""

_BEGINNINGS: dict[Compression, re.Pattern[bytes]] = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bz2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
"""First bytes of compressed files; no text begins so."""


def decompressed(file: IO[bytes], size: int, path: Place, dialect: Dialect) -> Iterator[bytes]:
    """Yield the content of a file, in pieces, as it was before it was compressed, if it was.

    Args:
        file: its bytes, from the first on.
        size: how many these are.
        path: where it comes from; ``dialect.compression = "auto"`` goes by its ending.
        dialect: how it is compressed.

    Raises:
        InputError: it is not compressed like that, is damaged or cut off, grows out of all
            proportion, or is an archive.
    """
    beginning = file.read(_CHUNK)
    kind = dialect.compression
    if kind == AUTO:
        kind = COMPRESSIONS.get(endings(path)[1], "none")
        for other, mark in _BEGINNINGS.items():
            if kind == "none" and mark.match(beginning):
                advice = dialect.advice(f'compression = "{other}"', "name it accordingly")
                raise InputError(
                    f"compressed by {other}, which its ending does not say, {path}; {advice}"
                )
    if kind == "none":
        if beginning.startswith(b"PK\3\4"):
            raise InputError(f"a zip archive, {path}; unpack it, or save its table as .csv")
        yield beginning
        yield from iter(partial(file.read, _CHUNK), b"")
        return
    file = cast(IO[bytes], io.BufferedReader(_Again(beginning, file)))
    limit, total = max(MOST_TIMES * size, ALWAYS_ALLOWED), 0
    try:
        for piece in _pieces(file, kind, path):
            total += len(piece)
            if total > limit:
                raise InputError(
                    f"grows from {size:,} bytes to more than {limit >> 20:,} MiB, {path}; "
                    "decompress it yourself if that is meant"
                )
            yield piece
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).strip() or type(error).__name__
        advice = "give the file whole"
        if dialect.table and not isinstance(error, EOFError):
            advice += f', or set {dialect.table}.compression = "none" if it is not compressed'
        raise InputError(f"cannot decompress by {kind}: {reason}, {path}; {advice}") from error


class _Again(io.RawIOBase):
    """A file whose beginning was read already."""

    def __init__(self, beginning: bytes, file: IO[bytes]) -> None:
        super().__init__()
        self._beginning, self._file = memoryview(beginning), file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = bytes(self._beginning[: len(buffer)]) or self._file.read(len(buffer))
        self._beginning = self._beginning[len(piece) :]
        buffer[: len(piece)] = piece
        return len(piece)


def _pieces(file: IO[bytes], kind: Compression, path: Place) -> Iterable[bytes]:
    if kind == "gzip":
        return iter(partial(gzip.GzipFile(fileobj=file).read, _CHUNK), b"")
    if kind == "zstd":
        return _zstd_pieces(file, path)
    return _pieces_of_streams(file, bz2.BZ2Decompressor if kind == "bz2" else lzma.LZMADecompressor)


def _pieces_of_streams(
    file: IO[bytes], new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
) -> Iterator[bytes]:
    """Yield what the streams hold that a file is made of.

    Python's own `open` takes whatever follows the first stream, damaged or not, for the end.
    """
    given = file.read(_CHUNK)
    while True:
        stream = new()
        while not stream.eof:
            if stream.needs_input and not given:
                given = file.read(_CHUNK)
                if not given:
                    raise EOFError("it ends before the end of its last stream")
            yield stream.decompress(given, _CHUNK)
            given = b""
        given = stream.unused_data.lstrip(b"\0")  # streams may be padded
        while not given:
            piece = file.read(_CHUNK)
            if not piece:
                return
            given = piece.lstrip(b"\0")


def _zstd_pieces(file: IO[bytes], path: Place) -> Iterable[bytes]:
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise InputError(
            f"{path}: reading Zstandard needs pyarrow (pip install pyarrow); or decompress it"
        ) from None
    return iter(partial(CompressedInputStream(file, "zstd").read, _CHUNK), b"")
