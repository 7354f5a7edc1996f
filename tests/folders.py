"""Folders of a package as docs/how-it-works.md orders them, and those that a module imports."""

import ast
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from .conftest import REPOSITORY

_ENTRIES = re.compile(r"^ {6}((?:\w+(?:/|\.py) ?)+)")


def listed(package: str) -> list[str]:
    """The folders and modules of a package, by the page's list, without ``/`` and ``.py``."""
    page = (REPOSITORY / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    lines = page.partition(f"\n    {package}/")[2].splitlines()[1:]
    entries = [
        found[1] for line in takewhile(_ENTRIES.match, lines) for found in _ENTRIES.finditer(line)
    ]
    names = [name for entry in entries for name in entry.split()]
    return [name.removesuffix("/").removesuffix(".py") for name in names]


def imported(path: Path, package: str) -> Iterator[str]:
    """Yield the first name below a package of everything that a module of it imports."""
    folders = path.relative_to(REPOSITORY / package).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        else:
            modules = []
        absolute = {module.split(".")[0] for module in modules} & {"engine", "kernels"}
        assert not absolute, f"{path}: imports within the packages are relative"
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*folders[: len(folders) - node.level + 1], *(node.module or "").split(".")]
            names = [name for name in base if name]
            yield from names[:1] or [alias.name for alias in node.names]


def imported_above(package: str, name: str, anywhere: frozenset[str]) -> list[str]:
    """Return a line for each module of an entry that imports one listed above it.

    Args:
        package: ``engine`` or ``kernels``.
        name: of the list.
        anywhere: names that every module may import.
    """
    order, place = listed(package), REPOSITORY / package / name
    allowed = {*order[order.index(name) :], *anywhere}
    modules = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    above = {path: sorted(set(imported(path, package)) - allowed) for path in modules}
    return [
        f"{path.relative_to(REPOSITORY)} imports {', '.join(names)}"
        for path, names in above.items()
        if names
    ]
