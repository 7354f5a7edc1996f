"""One process at a time in a folder: a lock that ends when the process that holds it does.

It is flock's, on a file that stays in the folder and says that this program began it.  Over NFS it
holds between machines; where a file system has no flock, the file's content names the process.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..distributed.ranks import Ranks
from ..utils.errors import InputError
from ..utils.files import explained

LOCK = ".superbert.lock"

_ATTEMPTS = 10

log = logging.getLogger(__name__)


@contextmanager
def held(folder: Path, ranks: Ranks | None = None, wait: float = 0.0) -> Iterator[None]:
    """Within the block no other process holds a folder, which is made if missing.

    If the block adds nothing to it, what was made for the lock is removed again.

    Args:
        folder: the folder.
        ranks: the processes that fill it together; the main rank holds it.
        wait: seconds for which to wait for the process that holds it.

    Raises:
        InputError: another process holds it, or it cannot be made.
    """
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        problem = None
        if ranks.is_main:
            try:
                stack.enter_context(_held(folder, [], wait))
            except InputError as error:
                problem = str(error)
        problem = ranks.broadcast(problem)
        if problem is not None:
            raise InputError(problem)
        yield


@contextmanager
def held_first(folders: Iterable[Path]) -> Iterator[Path]:
    """Hold, as :func:`held` does, the first of several folders that is not there yet."""
    for folder in folders:
        with explained("make", folder):
            made = _make(folder)
        if folder in made:
            break
    with _held(folder, made, 0.0):
        yield folder


@contextmanager
def _held(folder: Path, made: list[Path], wait: float) -> Iterator[None]:
    """Make a folder and hold it; ``made`` are those of it and its parents that were made before."""
    path = folder / LOCK
    lock, begun = FileLock(path, timeout=wait, thread_local=False), os.path.lexists(path)
    try:
        try:
            with explained("lock", folder):
                _acquire(lock, folder, made)
        except InputError as error:
            if error.__cause__ is not None and not begun:  # nobody can lock it
                _discard(path)
            raise
        before = _names(folder)
        try:
            yield
        finally:
            if not begun and _names(folder) == before:
                _discard(path)  # who has opened it sees that it has no name any more
            lock.release()
    finally:
        for parent in sorted(set(made), reverse=True):
            with suppress(OSError):  # it is not empty
                parent.rmdir()


def _acquire(lock: FileLock, folder: Path, made: list[Path]) -> None:
    for attempt in range(_ATTEMPTS):
        made += _make(folder)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                lock.acquire()
        except Timeout:
            raise InputError(
                f"{folder}: another process is at work there (it holds {LOCK}); wait for its end, "
                "or give another folder"
            ) from None
        except FileNotFoundError:  # its last holder has removed the folder meanwhile
            if attempt + 1 == _ATTEMPTS:
                raise
            continue
        if said:  # the library's, on falling back
            log.warning(
                "%s: this file system has no flock; should this machine die, remove its %s",
                *(folder, LOCK),
            )
        return


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _make(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that were not there."""
    missing = [path for path in (folder, *folder.parents) if not path.is_dir()]
    made = []
    for path in reversed(missing):
        with suppress(FileExistsError):
            path.mkdir()
            made.append(path)
    return made
