"""Files that are either whole or not there."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import InputError


@contextmanager
def explained(doing: str, path: Path) -> Iterator[None]:
    """Turn what the system refuses (disk full, no permission) into one clear line.

    Raises:
        InputError: in place of an OSError from the body, or of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"cannot {doing} {path}: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and put it in its place when whole.

    Raises:
        InputError: the system refuses it; ``path`` is what it was, and nothing else is left.
    """
    partial = path.with_name(path.name + ".partial")
    with explained("write", path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        sync(path.parent)


def sync(path: Path) -> None:
    """Make sure that a file's content, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and put it in the place of ``path`` when the body is done.

    If the body fails, nothing of it stays and ``path`` is what it was.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with explained("write", path):
        partial.mkdir(parents=True)
        try:
            yield partial
            for entry in (*partial.rglob("*"), partial):
                sync(entry)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
            sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
