"""What is wrong with a recipe, in one line."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from .data.rows import shorten


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Put pydantic's first finding into one line: key, what is wrong, what is known.

    Args:
        error: what validating a ``model`` raised.
        model: whose fields are suggested for an unknown key.
    """
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        return f"unknown key {'.'.join(location)}{nearest(location[-1], known)}"
    if not location:
        return message
    return f"{'.'.join(location)} = {shorten(repr(problem['input']), 80)}: {message}"


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """Return a hint to append: the known name that is most like ``name``, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"


def table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the table that a field holds: itself, or as the values of a dict, or optionally."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> Mapping[str, Any]:
    """Return the fields of the table at a place; names that a recipe chose are passed over."""
    for part in location:
        if part in model.model_fields:
            model = table_of(model.model_fields[part].annotation) or model
    return model.model_fields
