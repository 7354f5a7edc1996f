"""A folder of ``engine/`` imports only folders that the README lists below it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import REPOSITORY

ENGINE = REPOSITORY / "engine"
ANYWHERE = ("_kernels", "__version__")
"""Names that every folder may import of the package itself."""


def listed_folders() -> list[str]:
    """The folders of ``engine/`` in the order of the README."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    block = readme.partition("    engine/")[2].partition("    kernels/")[0]
    return re.findall(r"^      (\w+)/", block, re.MULTILINE)


def imported(path: Path) -> Iterator[str]:
    """Yield the first name below ``engine`` of everything that a module of it imports."""
    package = path.relative_to(ENGINE).parts[:-1]
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
            base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            names = [name for name in base if name]
            yield from names[:1] or [alias.name for alias in node.names]


def test_every_folder_is_listed() -> None:
    folders = [path.parent.name for path in ENGINE.glob("*/__init__.py")]
    assert sorted(folders) == sorted(listed_folders())


def test_only_commands_stand_at_the_top() -> None:
    commands = {"train", "evaluate", "predict", "export", "report", "sweep", "fill"}
    assert {path.stem for path in ENGINE.glob("*.py")} == commands | {"__init__", "_kernels"}


@pytest.mark.parametrize("folder", listed_folders())
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    order = listed_folders()
    allowed = {*order[order.index(folder) :], *ANYWHERE}
    for path in sorted((ENGINE / folder).rglob("*.py")):
        above = set(imported(path)) - allowed
        assert not above, f"{path.relative_to(REPOSITORY)} imports {', '.join(sorted(above))}"
