"""Decompress the content of a file, up to a size that no text needs."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from ..utils.errors import InputError
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


def decompress(content: bytes, path: Path, dialect: Dialect) -> bytes:
    """Return the content of a file as it was before it was compressed, if it was.

    Args:
        content: of the file.
        path: where it comes from; ``dialect.compression = "auto"`` goes by its ending.
        dialect: how it is compressed.

    Raises:
        InputError: it is not compressed like that, is damaged or cut off, grows out of all
            proportion, or is an archive.
    """
    kind = dialect.compression
    if kind == AUTO:
        kind = COMPRESSIONS.get(endings(path)[1], "none")
        for other, beginning in _BEGINNINGS.items():
            if kind == "none" and beginning.match(content):
                advice = dialect.advice(f'compression = "{other}"', "name it accordingly")
                raise InputError(
                    f"compressed by {other}, which its ending does not say, {path}; {advice}"
                )
    if kind == "none":
        if content.startswith(b"PK\3\4"):
            raise InputError(f"a zip archive, {path}; unpack it, or save its table as .csv")
        return content
    try:
        return _join(_pieces(content, kind, path), max(MOST_TIMES * len(content), ALWAYS_ALLOWED))
    except _TooLargeError as error:
        raise InputError(
            f"grows from {len(content):,} bytes to more than {error.limit >> 20:,} MiB, {path}; "
            "decompress it yourself if that is meant"
        ) from None
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).strip() or type(error).__name__
        advice = "give the file whole"
        if dialect.table and not isinstance(error, EOFError):
            advice += f', or set {dialect.table}.compression = "none" if it is not compressed'
        raise InputError(f"cannot decompress by {kind}: {reason}, {path}; {advice}") from error


class _TooLargeError(Exception):
    """There is more than ``limit`` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


def _join(pieces: Iterable[bytes], limit: int) -> bytes:
    kept, total = [], 0
    for piece in pieces:
        kept.append(piece)
        total += len(piece)
        if total > limit:
            raise _TooLargeError(limit)
    return b"".join(kept)


def _pieces(content: bytes, kind: Compression, path: Path) -> Iterable[bytes]:
    if kind == "gzip":
        return iter(partial(gzip.GzipFile(fileobj=io.BytesIO(content)).read, _CHUNK), b"")
    if kind == "zstd":
        return _zstd_pieces(content, path)
    return _pieces_of_streams(
        content, bz2.BZ2Decompressor if kind == "bz2" else lzma.LZMADecompressor
    )


def _pieces_of_streams(
    content: bytes, new: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor]
) -> Iterator[bytes]:
    """Yield what the streams hold that a file is made of.

    Python's own `open` takes whatever follows the first stream, damaged or not, for the end.
    """
    while True:
        stream, given = new(), content
        while not stream.eof:
            if stream.needs_input and not given:
                raise EOFError("it ends before the end of its last stream")
            yield stream.decompress(given, _CHUNK)
            given = b""
        content = stream.unused_data.lstrip(b"\0")  # streams may be padded
        if not content:
            return


def _zstd_pieces(content: bytes, path: Path) -> Iterable[bytes]:
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise InputError(
            f"{path}: reading Zstandard needs pyarrow (pip install pyarrow); or decompress it"
        ) from None
    return iter(partial(CompressedInputStream(io.BytesIO(content), "zstd").read, _CHUNK), b"")
