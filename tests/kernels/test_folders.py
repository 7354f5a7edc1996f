"""A folder or module of ``kernels/`` imports only those listed below it in the docs."""

import pytest

from ..conftest import REPOSITORY
from ..folders import imported, imported_above, listed

KERNELS = REPOSITORY / "kernels"
ANYWHERE = frozenset({"_extension"})
"""Every operator's module loads the extension, which imports nothing of the package."""


def test_every_folder_and_module_is_listed() -> None:
    folders = [path.parent.name for path in KERNELS.glob("*/__init__.py")]
    modules = [path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_")]
    assert sorted([*folders, *modules]) == sorted(listed("kernels"))


@pytest.mark.parametrize("name", listed("kernels"))
def test_a_folder_imports_only_those_below_it(name: str) -> None:
    assert not imported_above("kernels", name, ANYWHERE)


def test_the_extension_imports_nothing_of_the_package() -> None:
    assert not list(imported(KERNELS / "_extension.py", "kernels"))
