"""Write JSON, which has no NaN and no infinity: null stands for either."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def dump_json(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return a value as JSON that every parser reads back.

    Args:
        value: of dicts, lists, tuples, text, numbers, booleans and None; floats that are not finite
            become null.
        indent: spaces a level; None for one line.
        sort_keys: write the keys of objects in their order.
    """
    return json.dumps(_with_null(value), indent=indent, sort_keys=sort_keys, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_with_null(item) for item in value]
    return value
