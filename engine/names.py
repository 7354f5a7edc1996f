"""Names of files and data sets in a recipe, which may come from a stranger."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from .errors import UNPRINTABLE


def _printable(name: str) -> str:
    if UNPRINTABLE.search(name):
        raise ValueError("a name with control characters or halves of characters")
    return name


def _leads_down(name: str) -> str:
    if ".." in Path(name).parts:
        raise ValueError("a name that leaves the data folder; give an absolute one if it is meant")
    return name


Name = Annotated[str, AfterValidator(_printable)]
"""Text that terminals and file systems take as it is."""

FileName = Annotated[Name, AfterValidator(_leads_down)]
"""A file below the data folder, or anywhere by its absolute name."""
