"""Short and distinct names for files and folders."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePath

from .errors import InputError

_LONGEST = 200
"""Bytes of a name, before its ending; a file system allows 255 in all."""


def distinct_names(paths: Sequence[PurePath], ending: str = "") -> list[str]:
    """Name paths by their last part, and by as many folders before it as distinguish them.

    Args:
        paths: all different; whole ones, so that they have folders.
        ending: what to leave out at the end of a name, as ``.toml``.

    Returns:
        The names, joined by hyphens, in the order of the paths.

    Raises:
        InputError: two cannot be told apart so.
    """
    parts = [
        (*path.relative_to(path.anchor).parts[:-1], path.name.removesuffix(ending) or path.name)
        for path in paths
    ]
    used = [1] * len(paths)
    while True:
        names = ["-".join(own[-count:]) for own, count in zip(parts, used, strict=True)]
        alike = [i for i, name in enumerate(names) if names.count(name) > 1]
        if not alike:
            return names
        longer = [i for i in alike if used[i] < len(parts[i])]
        if not longer:
            raise InputError(f"{paths[alike[0]]} and {paths[alike[1]]}: rename one of them")
        for i in longer:
            used[i] += 1


def as_file_name(text: str) -> str:
    """Return a text as the name of one file or folder; no two give the same.

    What would lead elsewhere or cannot be shown is written as ``%XX``; of a text that is too long
    a hash stands for the end.
    """
    name = re.sub(r"[/\\%\x00-\x1f\x7f]", lambda found: f"%{ord(found[0]):02X}", text)
    if name in (".", ".."):
        return name.replace(".", "%2E")
    if len(name.encode()) <= _LONGEST:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{name.encode()[: _LONGEST - 17].decode(errors='ignore')}-{digest}"
