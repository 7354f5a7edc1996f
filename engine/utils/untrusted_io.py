"""Read untrusted files: paths that are no files, text that breaks the parser.

JSON and TOML parsers raise more than their own errors (RecursionError for brackets within brackets,
a plain ValueError for a number of five thousand digits).  Here all of it is a ValueError.
"""

import json
import os
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, cast

from .errors import InputError
from .memory import machine_memory

LARGEST_DOCUMENT = 64 << 20
"""Bytes of a file that says something about a run, a model, or a series of them."""

_PIECE, _IN_MEMORY = 1 << 20, 64 << 20


def read_bytes(path: Path, limit: int | None = LARGEST_DOCUMENT) -> bytes:
    """Return the content of an input file.

    Args:
        path: of the file.
        limit: the most bytes that it may have; None for as many as the machine has memory.

    Raises:
        InputError: it cannot be read, is too large, or is a pipe or device, which may never end.
    """
    try:
        found = path.stat()
        limit = machine_memory() if limit is None else limit
        if stat.S_ISREG(found.st_mode):
            if found.st_size <= limit:
                return path.read_bytes()
            reason = f"has {found.st_size:,} bytes, at most {limit:,} are expected"
        else:
            is_folder = stat.S_ISDIR(found.st_mode)
            reason = "is a directory" if is_folder else "is a pipe or a device"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except ValueError as error:  # a name with NUL in it
        reason = str(error)
    except MemoryError:
        reason = f"has {found.st_size:,} bytes, more than there is memory for"
    raise InputError(f"cannot read a file: {reason}, {path}; check the path")


def open_file(path: Path) -> IO[bytes]:
    """Open an input file of any size.

    Raises:
        InputError: it cannot be read, or is a pipe or device, which may never end.
    """
    try:
        # A pipe that nobody writes to would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(handle).st_mode
        if stat.S_ISREG(mode):
            return os.fdopen(handle, "rb")
        os.close(handle)
        reason = "is a directory" if stat.S_ISDIR(mode) else "is a pipe or a device"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except ValueError as error:  # a name with NUL in it
        reason = str(error)
    raise InputError(f"cannot read a file: {reason}, {path}; check the path")


def file_size(file: IO[bytes]) -> int:
    """Return how many bytes an open file has, whatever was read of it."""
    here = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(here)
    return size


def is_blank(file: IO[bytes]) -> bool:
    """Return whether an open file, of which nothing is read yet, has nothing but white space."""
    while piece := file.read(_PIECE):
        if piece.strip():
            break
    file.seek(0)
    return not piece


@contextmanager
def standard_input() -> Iterator[IO[bytes]]:
    """Open what a command reads from its standard input, to its end.

    It is kept in memory, and if it is large in a temporary file, so that it can be read in any
    order.

    Raises:
        InputError: it is closed, cannot be read or kept, or has more bytes than half of what the
            folder of temporary files has free.
    """
    with ExitStack() as stack:
        try:
            kept = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY))
            _keep_standard_input(kept)
            kept.seek(0)
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise InputError(f"cannot read standard input: {reason}; give a file") from None
        yield cast(IO[bytes], kept)


def _keep_standard_input(kept: "tempfile.SpooledTemporaryFile[bytes]") -> None:
    if sys.stdin is None:
        raise OSError("it is closed")
    size, limit = 0, _IN_MEMORY
    while piece := sys.stdin.buffer.read(_PIECE):
        size += len(piece)
        if size > limit == _IN_MEMORY:  # a file is needed from here on
            limit = max(limit, shutil.disk_usage(tempfile.gettempdir()).free // 2)
        if size > limit:
            raise InputError(
                f"standard input: more than {limit:,} bytes, half of what is free in "
                f"{tempfile.gettempdir()}; give a file, or set TMPDIR to a folder that has more"
            )
        kept.write(piece)


def parse_json(
    content: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Parse untrusted JSON.

    Args:
        content: the JSON.
        make_object: what makes an object of its keys and values; None for a dict.

    Raises:
        ValueError: it is none, or one that Python cannot hold.
    """
    try:
        return json.loads(content, object_pairs_hook=make_object)
    except RecursionError:
        raise ValueError("too many brackets within brackets") from None


def parse_toml(text: str) -> dict[str, Any]:
    """Parse untrusted TOML.

    Raises:
        ValueError: it is none, or one that Python cannot hold.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("too many brackets within brackets") from None
