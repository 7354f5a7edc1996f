"""Hugging Face's library ``kernels``, which this package hides when it stands at the top.

In the repository this package is called ``kernels``, too, and comes first on the path.  Where that
library is installed as well, transformers imports names from it; a name that this package lacks is
then looked up there.  Installed, this package is ``superbert.kernels`` and hides nothing.
"""

import importlib.util
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

_OURS = Path(__file__).parent


def namesake_attribute(package: str, name: str) -> object:
    """Return ``name`` of the hidden library.

    Args:
        package: the name under which this package was imported.
        name: what was asked of it.

    Raises:
        AttributeError: nothing is hidden, or the library does not have it either.
    """
    namesake = None if package != "kernels" or name.startswith("__") else _load()
    if namesake is None:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(namesake, name)


@cache
def _load() -> ModuleType | None:
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != _OURS.parent]
    found = PathFinder.find_spec("kernels", elsewhere)
    if found is None or found.origin is None or found.submodule_search_locations is None:
        return None
    # Its files import each other as kernels.*, so its folder becomes a further part of ours.
    sys.modules["kernels"].__path__.extend(found.submodule_search_locations)
    spec = importlib.util.spec_from_file_location("kernels._huggingface", found.origin)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
