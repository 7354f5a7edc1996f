"""Read the page on extending the engine, for the tests that run its examples."""

import re
from types import ModuleType

from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")

_FILE_HEADING = r"^\*\*The [\w ]+\*\*(?:,| is| are) `([\w/]+\.py)`"
_FILE = re.compile(
    _FILE_HEADING + r"(?:(?!^\*\*|^## |^```).)*^```python\n(.*?)^```", re.DOTALL | re.MULTILINE
)


def section(title: str) -> str:
    """Return the section of that title."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def files(text: str) -> dict[str, str]:
    """Return the files that a text shows in full: ``{path: content}``.

    A file is a Python block below a paragraph that begins with ``**The …**, `path.py```.
    """
    found = dict(_FILE.findall(text))
    assert [*found] == re.findall(_FILE_HEADING, text, re.MULTILINE)
    return found


def run_as(code: str, path: str) -> ModuleType:
    """Run the content of a file as the module that it would be."""
    module = ModuleType(path.removesuffix(".py").replace("/", "."))
    module.__package__ = module.__name__.rpartition(".")[0]
    exec(compile(code, path, "exec"), vars(module))
    return module
