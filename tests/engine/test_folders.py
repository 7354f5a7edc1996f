"""A folder of ``engine/`` imports only folders that docs/how-it-works.md lists below it."""

import pytest

from engine.__main__ import COMMANDS

from ..conftest import REPOSITORY
from ..folders import imported_above, listed

ENGINE = REPOSITORY / "engine"
ANYWHERE = frozenset({"_kernels", "__version__"})
"""Names that every folder may import of the package itself."""


def test_every_folder_is_listed() -> None:
    folders = [path.parent.name for path in ENGINE.glob("*/__init__.py")]
    assert sorted(folders) == sorted(listed("engine"))


def test_only_commands_stand_at_the_top() -> None:
    assert {path.stem for path in ENGINE.glob("*.py")} == {
        *COMMANDS,
        *("__init__", "__main__", "_kernels"),
    }


@pytest.mark.parametrize("folder", listed("engine"))
def test_a_folder_imports_only_those_below_it(folder: str) -> None:
    assert not imported_above("engine", folder, ANYWHERE)
