"""Files that a recipe names together: a list of them, a pattern, a folder."""

import glob
from collections.abc import Collection, Sequence
from os.path import exists, isdir
from pathlib import Path

from ..utils.errors import InputError
from ..utils.files import explained
from .addresses import Address, Place, is_address, matching
from .dialect import LAYOUTS, endings


def shards(
    names: Sequence[str], folder: Path, field: str, suffixes: Collection[str] = LAYOUTS.keys()
) -> list[Place]:
    """Return the files that some names stand for, each once, in an order that is always the same.

    Args:
        names: of files, of folders (all files in them with a known ending, but hidden ones), or
            patterns with ``*``, ``?`` and ``[a-z]``, and ``**`` for folders within folders; or
            addresses of files, and patterns of these.
        folder: that relative names start from.
        field: of the recipe that has the names, for error messages.
        suffixes: of the files of a folder that are read, but for that of their compression.

    Raises:
        InputError: a pattern or folder has no file, or a chain of addresses has a relative end.
    """
    found = dict[Place, None]()
    for name in names:
        if is_address(name):
            found |= dict.fromkeys(_addresses(Address(name), field))
        else:
            found |= dict.fromkeys(_files_of(folder, name, field, suffixes))
    return list(found)


def _addresses(address: Address, field: str) -> list[Address]:
    if address.is_relative:
        raise InputError(f"{field}: {address} ends in a relative path; write all of it, file:///…")
    if not address.is_pattern:
        return [address]
    found = matching(address)
    if not found:
        raise InputError(f"{field}: no file is called like {address}; correct the pattern")
    return found


def _files_of(folder: Path, name: str, field: str, suffixes: Collection[str]) -> list[Path]:
    path = folder / name
    if isdir(path):
        with explained("look into", path):
            files = [
                file
                for file in sorted(path.iterdir())
                if endings(file)[0] in suffixes and file.name[0] != "." and not isdir(file)
            ]
        if not files:
            known = ", ".join(suffixes)
            raise InputError(
                f"{field}: no file in {path} ends as those that are read ({known}); name another "
                "folder, or a pattern"
            )
        return files
    if glob.has_magic(name) and not exists(path):
        # Of the folder's own name nothing is a pattern.
        names = sorted(glob.glob(name, root_dir=folder, recursive=True))
        files = [folder / found for found in names if not isdir(folder / found)]
        if not files:
            raise InputError(f"{field}: no file is called like {path}; correct the pattern")
        return files
    return [path]
