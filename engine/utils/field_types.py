"""What the tables of a recipe have in common: how strict they are, and the ranges of their numbers.

Whole numbers end where 32 bits do, others where fp32 does, since that is what kernels compute with.
"""

from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field

_LARGEST_INT = (1 << 31) - 1
_LARGEST_REAL = torch.finfo(torch.float32).max

Count = Annotated[int, Field(ge=0, le=_LARGEST_INT)]
Positive = Annotated[int, Field(ge=1, le=_LARGEST_INT)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Real = Annotated[float, Field(ge=-_LARGEST_REAL, le=_LARGEST_REAL)]
NonNegativeReal = Annotated[float, Field(ge=0, le=_LARGEST_REAL)]
PositiveReal = Annotated[float, Field(gt=0, le=_LARGEST_REAL)]


class Settings(BaseModel):
    """A table whose fields are all checked, and none unknown."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )
