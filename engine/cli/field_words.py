"""Say in words what values the type of a recipe's field allows."""

from collections.abc import Iterable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from ..utils.field_types import LARGEST_REAL

_LARGEST = 1 << 31
_NAMES = {int: ("whole number", "whole numbers"), float: ("number", "numbers")}


def type_in_words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Return such as ``whole number, from 1``, or the values themselves where they are few.

    Args:
        annotation: the type, as pydantic has it.
        metadata: the bounds that pydantic keeps apart from it.
    """
    return _words(annotation, tuple(metadata), several=False)


def _words(annotation: Any, metadata: tuple[Any, ...], *, several: bool) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [one for given in arguments[1:] for one in getattr(given, "metadata", [given])]
        return _words(arguments[0], (*own, *metadata), several=several)
    if origin is Literal:
        return ", ".join(arguments)
    if origin in (Union, UnionType):
        forms = [_words(one, metadata, several=several) for one in arguments if one is not NoneType]
        if len(forms) > 2:
            return "values" if several else "value"
        return ", or ".join(forms)
    if origin in (tuple, list):
        is_pair = origin is tuple and ... not in arguments
        lists = "two" if is_pair else "lists of" if several else "list of"
        return f"{lists} {_words(arguments[0], (), several=True)}"
    if origin is dict:
        return "tables" if several else f"table of {_words(arguments[1], (), several=True)}"
    if annotation is bool:
        return "true or false"
    if annotation in _NAMES:
        return _NAMES[annotation][several] + _bounds(metadata)
    return "texts" if several else "text"


def _bounds(metadata: tuple[Any, ...]) -> str:
    """Return the bounds of a number, but for those that its format has anyway."""
    found = ""
    for attribute, word in {"ge": "from", "gt": "above", "le": "to", "lt": "below"}.items():
        for bound in (getattr(given, attribute, None) for given in metadata):
            limit = LARGEST_REAL if isinstance(bound, float) else _LARGEST - 1
            if bound is not None and abs(bound) < limit:
                found += (
                    f"{' ' if found.startswith(', from') and word == 'to' else ', '}{word} {bound}"
                )
    return found
