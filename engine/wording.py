"""What is wrong with a recipe, in one line, and which known name was probably meant."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from .data.rows import shorten

ANY_NAME = "NAME"
"""Stands for a name that the recipe chooses: of a task, of an objective."""

FIELDS = f"python -m {__package__}.train --fields"
"""The page of all fields of a recipe."""

_UNKNOWN = "extra_forbidden"
"""Pydantic's name for an unknown key."""

_FEW = 8
"""Known names that a message lists; of more it names the page."""
_MOST = 3
"""Names that are suggested at once; more are no help."""
_UNITS = frozenset(
    ("dir", "folder", "method", "mode", "path", "prob", "rate", "ratio", "size", "steps", "type")
)
"""Last words that name a kind of value, and that the field's own name may lack."""


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Put one of pydantic's findings into one line: key, what is wrong, what is known.

    An unknown key comes first: what is missing is often only spelled otherwise.

    Args:
        error: what validating a ``model`` raised.
        model: whose fields are suggested for an unknown key.
    """
    problems = error.errors()
    problem = next((one for one in problems if one["type"] == _UNKNOWN), problems[0])
    location, value = [str(part) for part in problem["loc"]], problem["input"]
    key, message = ".".join(location), problem["msg"].removeprefix("Value error, ")
    if problem["type"] == _UNKNOWN:
        return f"unknown key {key}{_nearest_key(location, model)}"
    if problem["type"] == "missing":
        return f"{key}: missing; give it a value"
    if not location:
        return message
    if problem["type"] == "tuple_type":
        example = f", such as {json.dumps([value])}" if isinstance(value, str) else ""
        message = f"expected a list{example}"
    return f"{key} = {shorten(repr(value), 80)}: {message}"


def nearest(name: str, known: Iterable[str], page: str = "") -> str:
    """Return a hint to append: the known names that ``name`` is close to, and where all are.

    Args:
        name: what is not known.
        known: what could have been meant.
        page: the command that shows them all, if there is one; without close names, and where
            they are many, it takes the place of the list.
    """
    known = list(known)
    meant, shown = close(name, known), f"{page} shows all" if page else ""
    if meant:
        return "; ".join(filter(None, (f"; did you mean {' or '.join(meant)}?", shown)))
    listed = "" if page and len(known) > _FEW else f"known: {', '.join(known)}"
    return f"; {listed or shown}"


def close(name: str, known: Iterable[str]) -> list[str]:
    """Return the known names that ``name`` is close to, the likeliest first, or none of them.

    Close is, in this order: the same letters (``batchsize``); one edit away, two from six letters
    on (``epoch``); the same words but for one before or a unit behind (``num_epochs``,
    ``warmup_ratio``); a part of the other, from its beginning or a whole word (``freeze``,
    ``dropout``); its initials (``bs``, ``learning_rate`` for lr).
    """
    known = list(dict.fromkeys(known))
    asked = _letters(name)
    for alike in (_equal, _few_edits, _same_words, _part, _initials):
        ranks = ((alike(asked, _letters(other)), other) for other in known)
        found = sorted((rank, other) for rank, other in ranks if rank is not None)
        best = [other for rank, other in found if rank == found[0][0]]
        if 0 < len(best) <= _MOST:
            return best
    return []


def _letters(name: str) -> str:
    return name.lower().replace("-", "_")


# Each measure returns a rank, the smaller the closer, or None for names that are not alike.


def _equal(name: str, other: str) -> int | None:
    return 0 if name.replace("_", "") == other.replace("_", "") else None


def _few_edits(name: str, other: str) -> int | None:
    longest = max(len(name), len(other))
    if longest < 3:
        return None
    edits = _edits(name, other)
    return edits if edits <= (1 if longest < 6 else 2) else None


def _same_words(name: str, other: str) -> int | None:
    words, own = name.split("_"), other.split("_")
    if len(words) > 1 and words[-1] in _UNITS and words[:-1] == own:
        return 0
    return 1 if len(other) >= 4 and words[1:] == own else None


def _part(name: str, other: str) -> int | None:
    if len(name) >= 3 and other.startswith(name):
        return 0
    if len(name) >= 4 and name in other.split("_"):
        return 1
    rest = name.removeprefix(other)
    return 2 if rest != name and "_" not in rest else None


def _initials(name: str, other: str) -> int | None:
    return 0 if name == _initials_of(other) or other == _initials_of(name) else None


def _initials_of(name: str) -> str:
    words = name.split("_")
    return "".join(word[0] for word in words) if min(map(len, words)) > 1 < len(words) else ""


def _edits(one: str, other: str) -> int:
    """Count the letters to insert, drop, replace, or swap with their neighbours."""
    before: list[int] = []
    last = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, wanted in enumerate(other, 1):
            least = min(last[j] + 1, row[-1] + 1, last[j - 1] + (letter != wanted))
            if before and j > 1 and letter == other[j - 2] and one[i - 2] == wanted:
                least = min(least, before[j - 2] + 1)
            row.append(least)
        before, last = last, row
    return last[-1]


def table_of(annotation: Any) -> type[BaseModel] | None:
    """Return the table that a field holds: itself, or as the values of a dict, or optionally."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def keys_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields, tables by their own fields."""
    for name, info in model.model_fields.items():
        table = table_of(info.annotation)
        if table is None:
            yield prefix + name
        else:
            named = f"{ANY_NAME}." if get_origin(info.annotation) is dict else ""
            yield from keys_of(table, f"{prefix}{name}.{named}")


def _nearest_key(location: Sequence[str], model: type[BaseModel]) -> str:
    """Return the hint for an unknown key: a field of that table, or of that name elsewhere."""
    known, key = _fields_at(model, location[:-1]), location[-1]
    elsewhere = [other for other in keys_of(model) if other.split(".")[-1] == key]
    if not close(key, known) and 0 < len(elsewhere) <= _MOST:
        return f"; did you mean {' or '.join(elsewhere)}?; {FIELDS} shows all"
    return nearest(key, known, FIELDS)


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> Mapping[str, Any]:
    """Return the fields of the table at a place; names that a recipe chose are passed over."""
    for part in location:
        if part in model.model_fields:
            model = table_of(model.model_fields[part].annotation) or model
    return model.model_fields
