"""Write files that a user names, and replace existing ones only if asked to."""

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os.path import realpath
from pathlib import Path
from typing import IO

from .errors import InputError
from .files import explained, whole_file

_LINKS = 40
"""As many as Linux follows."""


def check_outputs(
    paths: Iterable[Path], *, force: bool = False, inputs: Iterable[Path] = ()
) -> bool:
    """Check, before any work is done, that files can be written without loss.

    Pipes and character devices are written to.  Other things that are there must be regular files,
    and are replaced only with ``force``; without it a user at a terminal is asked.

    Args:
        paths: the files.
        force: whether those that are there are to be replaced.
        inputs: files that are read, which are never replaced.

    Returns:
        Whether those that are there are to be replaced, for :func:`write_output`.

    Raises:
        InputError: one is there and stays, or is no file, or one of the inputs.
    """
    paths = list(paths)
    for path in paths:
        if any(_is_same(path, source) for source in inputs):
            raise InputError(f"{path}: is the file that is read; give another name")
    there = [path for path in paths if _is_there(path)]
    if force or not there:
        return force
    if sys.stdin.isatty() and sys.stdout.isatty():
        names = ", ".join(map(str, there))
        if input(f"{names}: there already; replace? [y/N] ").strip().lower() in ("y", "yes"):
            return True
    raise _there_already(there[0])


def write_output(path: Path, content: str | bytes, *, replace: bool = False) -> None:
    """Write a file that a user named, whole or not at all; to a pipe or device, what there is.

    Args:
        path: the file.
        content: text, as UTF-8, or bytes.
        replace: whether a regular file that is there is replaced.

    Raises:
        InputError: as of :func:`check_outputs`, or the system refuses it.
    """
    with open_output(path, replace=replace) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def open_output(path: Path, *, replace: bool = False) -> Iterator[IO[bytes]]:
    """Open a file that a user named, which has its name when the body is done, or is not there.

    To a pipe or device the body writes as it goes.

    Args:
        path: the file.
        replace: whether a regular file that is there is replaced.

    Raises:
        InputError: as of :func:`check_outputs`, or the system refuses it.
    """
    if _is_there(path) and not replace:
        raise _there_already(path)
    with explained("write", path):
        number, real = _descriptor(path), Path(realpath(path))
        if number is not None:
            sys.stdout.flush()  # what was printed before comes before it
            number = os.dup(number)
        elif real.exists() and not real.is_file():
            number = os.open(real, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        with whole_file(real) if number is None else open(number, "wb") as file:
            yield file


def _there_already(path: Path) -> InputError:
    return InputError(f"{path}: is there already; give another name, or --force to replace it")


def _is_there(path: Path) -> bool:
    """Return whether a regular file would be replaced.

    Raises:
        InputError: there is something that is neither replaced nor written to.
    """
    with explained("look at", path):
        if _descriptor(path) is not None:
            return False
        try:
            mode = os.stat(realpath(path)).st_mode
        except FileNotFoundError:
            if os.path.lexists(path):
                raise InputError(
                    f"{path}: is a link to what is not there; name the file itself"
                ) from None
            return False
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder; give the name of a file")
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
        raise InputError(f"{path}: is no file, pipe or character device; give another name")
    return stat.S_ISREG(mode)


def _is_same(output: Path, source: Path) -> bool:
    """Return whether two names are of one regular file."""
    try:
        number = _descriptor(output)
        one = os.stat(realpath(output)) if number is None else os.fstat(number)
        return stat.S_ISREG(one.st_mode) and os.path.samestat(one, source.stat())
    except OSError:
        return False


def _descriptor(path: Path) -> int | None:
    """Return the number of the open file that a name such as ``/dev/stdout`` stands for.

    Opened by its name, what is behind it (a redirection) would be overwritten from its beginning.
    """
    for _ in range(_LINKS):
        folder = Path(realpath(path.parent))
        if folder == Path(f"/proc/{os.getpid()}/fd") and path.name.isdecimal():
            return int(path.name)
        if not os.path.islink(path):
            return None
        path = folder / os.readlink(path)
    return None
