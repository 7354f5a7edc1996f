"""The entries of the cache, to be shown and removed."""

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..utils.files import explained
from ..utils.ownership import check_private_place
from .entry import DamagedEntryError, about

_ENTRY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"making-\w+")
_STALE = 24 * 60 * 60
"""Seconds after which nobody is making an entry any more."""


class CachedEntry(NamedTuple):
    """An entry.

    Attributes:
        folder: of it.
        data: the name of what it was made from.
        what: it is.
        size: bytes of its files.
        used: seconds since the epoch, when it was last used.
    """

    folder: Path
    data: str
    what: str
    size: int
    used: float


def entries_of(root: Path) -> list[CachedEntry]:
    """Return the entries of a cache, the last used first.

    Args:
        root: the folder of the cache; it need not be there.

    Raises:
        InputError: it cannot be read, or others can write it.
    """
    check_private_place(root)
    with explained("look into", root):
        return sorted(_entries(root), key=lambda entry: -entry.used) if root.is_dir() else []


def _entries(root: Path) -> Iterator[CachedEntry]:
    for folder in root.iterdir():
        if not _ENTRY.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            data, what = about(folder)
        except DamagedEntryError:
            data, what = "damaged", ""
        size = sum(file.lstat().st_size for file in folder.iterdir())
        yield CachedEntry(folder, data, what, size, folder.stat().st_mtime)


def unfinished(root: Path) -> list[Path]:
    """Return the folders of entries that a killed process did not finish."""
    with explained("look into", root):
        return [
            folder
            for folder in (root.iterdir() if root.is_dir() else ())
            if _UNFINISHED.fullmatch(folder.name)
            and not folder.is_symlink()
            and time.time() - folder.lstat().st_mtime > _STALE
        ]


def remove(folder: Path) -> None:
    """Remove an entry, so that at no moment half of it has its name."""
    with explained("remove", folder):
        doomed = folder
        if _ENTRY.fullmatch(folder.name):
            doomed = folder.rename(folder.with_name(f"making-removed-{folder.name}"))
        shutil.rmtree(doomed)
