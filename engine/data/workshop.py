"""Folders in the cache for what is not complete yet, which a killed process leaves behind.

Each has a file that is locked as long as the process is alive that works there, on any machine.
"""

import fcntl
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = "making-", "lock"
_NAME = re.compile(rf"{_PREFIX}[\w-]+")
_STALE = 24 * 60 * 60
"""Seconds without a change after which nobody works where locks do not tell."""


@contextmanager
def workshop(root: Path) -> Iterator[Path]:
    """Make an empty folder in a cache for the block, which is removed with all that is in it.

    Raises:
        OSError: the system refuses it.
    """
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root) as name:
        folder = Path(name) / "made"
        with _held(Path(name)):
            folder.mkdir(mode=0o700)
            yield folder


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    # It has its name when it is locked, so that nobody finds it free before.
    path = folder / f"new-{_LOCK}"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.rename(folder / _LOCK)
        yield
    finally:
        os.close(handle)


def abandoned(root: Path) -> list[Path]:
    """Return the folders of processes that were killed.

    Raises:
        OSError: the cache cannot be looked into.
    """
    return [
        folder
        for folder in (root.iterdir() if root.is_dir() else ())
        if _NAME.fullmatch(folder.name) and not folder.is_symlink() and _is_abandoned(folder)
    ]


def _is_abandoned(folder: Path) -> bool:
    try:
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return _is_old(folder)
    except OSError:  # it belongs to others
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:
        return _is_old(folder)
    finally:
        os.close(handle)


def _is_old(folder: Path) -> bool:
    """Return whether nothing in it has changed for long."""
    try:
        newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:  # somebody removes it
        return False
    return time.time() - newest > _STALE
