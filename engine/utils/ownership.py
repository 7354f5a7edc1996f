"""Check that nobody else can have written a file, before a cache reads it."""

import grp
import os
import pwd
import stat
from pathlib import Path

from .errors import InputError


def check_private_place(folder: Path) -> None:
    """Refuse a folder in which somebody else could put other files in the place of the user's.

    Args:
        folder: need not exist; so are those that it lies in.

    Raises:
        InputError: one of them belongs to another user, or others may write into it.  They may
            where its sticky bit is set, as in ``/tmp``: there each can replace only their own.
    """
    place = Path(os.path.realpath(folder))
    for path in (place, *place.parents):
        try:
            found = path.stat()
        except OSError:
            continue
        if found.st_uid not in (0, os.geteuid()):
            reason = "belongs to another user"
        elif _others_write(found) and not found.st_mode & stat.S_ISVTX:
            reason = "can be written by others"
        else:
            continue
        raise InputError(
            f"the cache of tokenized data is not read from {folder}: {path} {reason}; set "
            "SUPERBERT_CACHE to a folder of your own"
        )


def is_own_folder(folder: Path) -> bool:
    """Return whether a folder and the files in it are the user's, and nobody else can write them.

    What is neither a regular file nor a folder, such as a symbolic link, is nobody's.

    Raises:
        OSError: one of them cannot be looked at.
    """
    return stat.S_ISDIR(folder.lstat().st_mode) and all(
        _is_own(path.lstat()) for path in (folder, *folder.iterdir())
    )


def _is_own(found: os.stat_result) -> bool:
    plain = stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)
    return plain and found.st_uid == os.geteuid() and not _others_write(found)


def _others_write(found: os.stat_result) -> bool:
    """Return whether others may write; a group of the user's name has no other member."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and not _is_private_group(found.st_gid)


def _is_private_group(number: int) -> bool:
    try:
        return grp.getgrgid(number).gr_name == pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return False
