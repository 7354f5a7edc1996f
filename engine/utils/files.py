"""Write files and folders atomically.

They are written under a temporary name in the same folder, ``.NAME-XXXXXXXX.partial`` with eight
random hexadecimal digits, which replaces no existing file and follows no link, and renamed when
complete.  Nothing is removed but what this program wrote.
"""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from .errors import InputError

_PARTIAL = re.compile(r"\.(.+)-[0-9a-f]{8}\.partial", re.DOTALL)


@contextmanager
def explained(doing: str, path: object) -> Iterator[None]:
    """Turn errors of the system (disk full, no permission) into one clear line.

    Args:
        doing: what, such as "read".
        path: to what; a path, or an address.

    Raises:
        InputError: in place of an OSError from the body, or of what safetensors makes of one.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise InputError(f"cannot {doing} {path}: {reason}") from error


def resolved(path: Path) -> Path:
    """Return a path that a user names without links and ``..``; relative where it was and can be.

    A folder that does not exist has no parent: ``p/new/..`` is ``p``.

    Raises:
        InputError: the folder that it is looked at from is gone.
    """
    with explained("look at", path):
        real, here = Path(os.path.realpath(path)), Path(os.path.realpath("."))
    return real if path.is_absolute() or not real.is_relative_to(here) else real.relative_to(here)


def check_own_file(path: Path) -> None:
    """Refuse what stands where a file of this program's goes and is none.

    Raises:
        InputError: it is a link, a folder, a pipe or a device.
    """
    if os.path.lexists(path) and not stat.S_ISREG(path.lstat().st_mode):
        raise InputError(f"{path}: is no regular file (a link?); move it elsewhere")


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, and rename it when complete.

    Raises:
        InputError: the system refuses it; ``path`` is what it was, and nothing else is left.
    """
    with explained("write", path), whole_file(path) as file:
        file.write(text.encode("utf-8"))


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file, and rename it to ``path`` when the body is done.

    If the body fails, nothing of it stays and ``path`` is what it was.

    Raises:
        OSError: the system refuses it.
    """
    partial = _partial_of(path)
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(handle)
        os.replace(partial, path)
    except BaseException:
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
def whole_folder(path: Path, known: re.Pattern[str] | None = None) -> Iterator[Path]:
    """Make an empty temporary folder, and rename it to ``path`` when the body is done.

    If the body fails, nothing of it stays and ``path`` is what it was.

    Args:
        path: where it goes; an empty folder may be there.
        known: the names of files; a folder that holds no other may be there too, and is removed.

    Raises:
        InputError: the system refuses it, or something else is there.
    """
    with explained("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = new_partial_folder(path)
        try:
            yield partial
            put_folder(partial, path, known)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # all in it is ours
            raise


def new_partial_folder(path: Path) -> Path:
    """Make a new folder under the temporary name of another."""
    partial = _partial_of(path)
    partial.mkdir()
    return partial


def put_folder(partial: Path, path: Path, known: re.Pattern[str] | None = None) -> None:
    """Give a folder that is complete its name.

    Args:
        partial: the folder.
        path: its name.
        known: as :func:`whole_folder`'s.

    Raises:
        InputError: what stands there is not to be removed.
        OSError: the system refuses it.
    """
    for entry in (*partial.rglob("*"), partial):
        sync(entry)
    if known is not None and os.path.lexists(path):
        remove_folder(path, known)
    partial.rename(path)  # over an empty folder, but over nothing else
    sync(path.parent)


def remove_folder(path: Path, known: re.Pattern[str]) -> None:
    """Remove a folder that this program filled, so that at no moment half of it has its name.

    Args:
        path: the folder.
        known: the names of the files that it may hold.

    Raises:
        InputError: it is a link or no folder, or holds something else: nothing is removed.
    """
    with explained("remove", path):
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise InputError(f"{path}: is no folder (a link?); move it elsewhere")
        for entry in list(os.scandir(path)):
            if not (known.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
                raise InputError(
                    f"{path}: holds {entry.name!r}, which this program did not write; "
                    "move it elsewhere"
                )
        doomed = path if _PARTIAL.fullmatch(path.name) else path.rename(_partial_of(path))
        for file in list(doomed.iterdir()):
            file.unlink()
        doomed.rmdir()


def is_partial(name: str, of: re.Pattern[str]) -> bool:
    """Return whether a name is the temporary name of a file or folder."""
    found = _PARTIAL.fullmatch(name)
    return found is not None and of.fullmatch(found[1]) is not None


def remove_partial_files(folder: Path, of: re.Pattern[str]) -> None:
    """Remove the temporary files of a killed process: regular files of such names."""
    with explained("look into", folder):
        for entry in list(os.scandir(folder)):
            if is_partial(entry.name, of) and entry.is_file(follow_symlinks=False):
                os.unlink(entry.path)


def _partial_of(path: Path) -> Path:
    # A file system's names have 255 bytes, a character up to four.
    return path.with_name(f".{path.name[:50]}-{secrets.token_hex(4)}.partial")
