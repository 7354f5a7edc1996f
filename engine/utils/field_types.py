"""Types of recipe fields: numbers within their ranges, names, and the table that holds them.

Whole numbers end where 32 bits do, others where fp32 does, since that is what kernels compute with.
Names of files and data sets may come from a recipe that somebody else wrote.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from .errors import UNPRINTABLE

_LARGEST_INT = (1 << 31) - 1
LARGEST_REAL = torch.finfo(torch.float32).max

Count = Annotated[int, Field(ge=0, le=_LARGEST_INT)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST_INT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Real = Annotated[float, Field(ge=-LARGEST_REAL, le=LARGEST_REAL)]
NonNegativeReal = Annotated[float, Field(ge=0, le=LARGEST_REAL)]
PositiveReal = Annotated[float, Field(gt=0, le=LARGEST_REAL)]


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


T = TypeVar("T")
ONE, SEVERAL = "[one]", "[several]"
"""What pydantic calls the two forms of a value in the place of an error."""


def _form(value: Any) -> str:
    return SEVERAL if isinstance(value, list | tuple) else ONE


OneOrSeveral = Annotated[
    Annotated[T, Tag(ONE)] | Annotated[tuple[T, ...], Tag(SEVERAL)], Discriminator(_form)
]
"""A value, or a list of such values."""


class Settings(BaseModel):
    """A table whose fields are all checked, and none unknown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
