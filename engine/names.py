"""Names of files and data sets in a recipe, which may come from a stranger."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from .utils.errors import UNPRINTABLE


def _printable(name: str) -> str:
    if UNPRINTABLE.search(name):
        raise ValueError("a name with control characters or halves of characters")
    return name


def _not_blank(name: str) -> str:
    if name and not name.strip():
        raise ValueError("nothing but spaces; give a name")
    return name


def _given(name: str) -> str:
    if not name.strip():
        raise ValueError("empty; give a name")
    return name


def _leads_down(name: str) -> str:
    if ".." in Path(name).parts:
        raise ValueError("a name that leaves the data folder; give an absolute one if it is meant")
    return name


Name = Annotated[str, AfterValidator(_printable), AfterValidator(_not_blank)]
"""Text that terminals and file systems take as it is; empty where there is none."""

GivenName = Annotated[Name, AfterValidator(_given)]
"""A name that is not empty."""

FileName = Annotated[GivenName, AfterValidator(_leads_down)]
"""A file below the data folder, or anywhere by its absolute name."""
