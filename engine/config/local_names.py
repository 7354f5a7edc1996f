"""Name the data of a recipe without the paths of this machine, for what is given to others."""

from collections.abc import Callable, Mapping
from os.path import expanduser, isdir
from pathlib import Path
from typing import Any

import tomli_w

from .recipe import Recipe


def toml_without_paths(recipe: Recipe) -> str:
    """Return every setting of a recipe as TOML, files and folders by their last names."""
    settings = recipe.model_dump(mode="json", exclude_none=True)
    sources = [task["source"] for task in settings["tasks"].values() if "source" in task]
    for table in (settings, *sources, *settings["objectives"].values()):
        for key in table.keys() & _NAMED:
            table[key] = _renamed(table[key], _NAMED[key])
    return tomli_w.dumps(settings)


def local_name(name: str) -> str:
    """Return the last name of a folder of this machine; the name of a hub as it is."""
    path = Path(expanduser(name))
    is_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return path.resolve().name or "/" if name and (is_local or isdir(path)) else name


def file_name(name: str) -> str:
    """Return the last name of a file, a pattern or an address, which may have folders in it."""
    return name.rstrip("/").rpartition("/")[2] or "/"


_NAMED: Mapping[str, Callable[[str], str]] = {
    "data": local_name,
    "init": local_name,
    "dataset": local_name,
    "files": file_name,
}
"""Keys of a recipe, its sources and objectives whose values may be paths of this machine."""


def _renamed(value: Any, rename: Callable[[str], str]) -> Any:
    """Return a path, or those of a list or table, by its last name."""
    if isinstance(value, Mapping):
        return {key: _renamed(path, rename) for key, path in value.items()}
    return rename(value) if isinstance(value, str) else [rename(path) for path in value]
