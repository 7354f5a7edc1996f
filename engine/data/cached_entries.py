"""The entries of the cache, to be shown and removed."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..utils.files import explained
from ..utils.ownership import check_private_place
from .entry import DamagedEntryError, about
from .workshop import abandoned, workshop

_ENTRY = re.compile(r"[0-9a-f]{64}")


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
        if not os.path.lexists(root):
            return []
        return sorted(_entries(root), key=lambda entry: -entry.used)


def _entries(root: Path) -> Iterator[CachedEntry]:
    for folder in root.iterdir():
        if not _ENTRY.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
            continue
        try:
            data, what = about(folder)
        except DamagedEntryError:
            data, what = "damaged", ""
        with suppress(FileNotFoundError):  # another process has removed it
            size = sum(file.lstat().st_size for file in folder.iterdir())
            yield CachedEntry(folder, data, what, size, folder.stat().st_mtime)


def remove_entry(entry: CachedEntry) -> None:
    """Remove an entry, so that at no moment half of it has its name.

    Raises:
        InputError: the system refuses it.
    """
    root = entry.folder.parent
    with (
        explained("remove", entry.folder),
        workshop(root) as place,
        suppress(FileNotFoundError),  # another process has removed it
    ):
        entry.folder.rename(place / entry.folder.name)


def remove_abandoned(root: Path) -> int:
    """Remove what killed processes left of entries that they made; return how much that was.

    Raises:
        InputError: the system refuses it.
    """
    with explained("look into", root):
        folders = abandoned(root)
    size = 0
    for folder in folders:
        # Another process may remove it, too.
        with explained("remove", folder), suppress(FileNotFoundError):
            size += sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
            shutil.rmtree(folder, ignore_errors=True)
            if os.path.lexists(folder):
                shutil.rmtree(folder)  # which says why it stays
    return size
