"""Decompress the content of a file, up to a size that no text needs."""

import bz2
import gzip
import io
import lzma
import re
import zlib
from pathlib import Path
from typing import IO, Any

from ..errors import InputError
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
"""How compressed files begin, where no text begins so."""


def decompress(content: bytes, path: Path, dialect: Dialect) -> bytes:
    """Return the content of a file as it was before it was compressed, if it was.

    Args:
        content: of the file.
        path: where it comes from; ``dialect.compression = "auto"`` goes by its ending.
        dialect: how it is compressed.

    Raises:
        InputError: it is not compressed like that, is cut off, or grows out of all proportion.
    """
    kind = dialect.compression
    if kind == AUTO:
        kind = COMPRESSIONS.get(endings(path)[1], "none")
        for other, beginning in _BEGINNINGS.items():
            if kind == "none" and beginning.match(content):
                advice = dialect.advice(f'compression = "{other}"', "name it accordingly")
                raise InputError(f"compressed by {other}, which its ending hides, {path}; {advice}")
    if kind == "none":
        return content
    try:
        return _read(_opened(content, kind, path), max(MOST_TIMES * len(content), ALWAYS_ALLOWED))
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


def _read(stream: IO[bytes], limit: int) -> bytes:
    pieces, total = [], 0
    while piece := stream.read(_CHUNK):
        pieces.append(piece)
        total += len(piece)
        if total > limit:
            raise _TooLargeError(limit)
    return b"".join(pieces)


def _opened(content: bytes, kind: Compression, path: Path) -> IO[bytes]:
    compressed = io.BytesIO(content)
    open_: Any = {"gzip": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(kind)
    stream: IO[bytes] = open_(compressed) if open_ else _opened_zstd(compressed, path)
    return stream


def _opened_zstd(compressed: io.BytesIO, path: Path) -> Any:
    try:
        from pyarrow import CompressedInputStream
    except ImportError:
        raise InputError(
            f"{path}: reading Zstandard needs pyarrow (pip install pyarrow); or decompress it"
        ) from None
    return CompressedInputStream(compressed, "zstd")
