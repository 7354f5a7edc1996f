"""Describe errors of a recipe in one line, with the known name that was probably meant."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from ..data.rows import shorten
from ..utils.field_types import ONE, SEVERAL
from .other_names import OPTIONS, OTHER_NAMES

ANY_NAME = "NAME"
"""Stands for a name that the recipe chooses: of a task, of an objective."""

FIELDS = f"python -m {__package__.rpartition('.')[0]}.train --fields"
"""The page of all fields of a recipe."""

_UNKNOWN = "extra_forbidden"
"""Pydantic's name for an unknown key."""

_FEW = 8
"""Known names that a message lists; of more it names the page."""
_MOST = 4
"""Names that are suggested at once; more are no help."""
_KINDS = frozenset(
    (
        *("dir", "folder", "fraction", "method", "mode", "name", "p", "path", "percent", "prob"),
        *("proportion", "rate", "ratio", "size"),
    )
)
"""Last words that say what kind of value it is; names are alike without them."""
_COUNTING = frozenset(
    ("device", "gpu", "max", "n", "num", "number", "of", "per", "the", "total", "train", "training")
)
"""First words that names are alike without."""
_VERBS = frozenset(("checkpoint", "clip", "freeze", "keep", "log"))
"""First words of fields that do something to what their last word names."""


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """Put one of pydantic's findings into one line: key, what is wrong, what is known.

    An unknown key comes first: what is missing is often only spelled otherwise.

    Args:
        error: what validating a ``model`` raised.
        model: whose fields are suggested for an unknown key.
    """
    problems = error.errors()
    problem = next((one for one in problems if one["type"] == _UNKNOWN), problems[0])
    location = [str(part) for part in problem["loc"] if part not in (ONE, SEVERAL)]
    value = problem["input"]
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
    """Return the known names that were probably meant by ``name``, or none of them.

    Close is, in this order: the same letters (``batchsize``); what other trainers call it
    (``learning_rate``); an edit away, two from six letters on (``epoch``); the same words but for
    such as count or say the kind of value (``num_epochs``, ``dropout_rate``); its first words
    (``freeze``); its last words (``decay``), unless something is done to them (``clip_norm``).

    Args:
        name: what is not known; dotted where it stands in a table.
        known: what could have been meant; names in its own table come before others.  Options
            are meant by what others call them alone.
    """
    known = list(dict.fromkeys(known))
    table, _, asked = name.rpartition(".")
    fields = [other for other in known if other not in OPTIONS]
    siblings = [other for other in fields if other.rpartition(".")[0] == table]

    def alike(among: Iterable[str], *measures: Measure) -> Iterator[list[str]]:
        return (_closest(asked, among, measure) for measure in measures)

    def called(elsewhere: str) -> Iterator[list[str]]:
        meant = OTHER_NAMES.get(_letters(elsewhere))
        yield [meant] if meant in known else []

    by_words = (_same_words, _first_words, _last_words)
    inside = (alike(siblings, _few_edits, *by_words), called(asked), alike(fields, _equal))
    on_top = (
        called(asked),
        alike(siblings, _few_edits),
        alike(fields, _equal),
        alike(siblings, *by_words),
    )
    found = itertools.chain(
        alike(siblings, _equal),
        called(name),
        *(inside if table else on_top),
        alike(fields, _same_words, _one_edit_of_many, _last_words),
    )
    return next((names for names in found if 0 < len(names) <= _MOST), [])


Measure = Callable[[str, str], int | None]
"""Of a name and a known one: a rank, the smaller the closer, or None if they are not alike."""


def _closest(asked: str, names: Iterable[str], measure: Measure) -> list[str]:
    asked = _letters(asked)
    ranks = ((measure(asked, _letters(other.rpartition(".")[2])), other) for other in names)
    found = sorted((rank, other) for rank, other in ranks if rank is not None)
    return [other for rank, other in found if rank == found[0][0]]


def _letters(name: str) -> str:
    return name.lower().replace("-", "_")


def _equal(name: str, other: str) -> int | None:
    return 0 if name.replace("_", "") == other.replace("_", "") else None


def _few_edits(name: str, other: str) -> int | None:
    shortest, longest = sorted((len(name), len(other)))
    if longest < 3 or (shortest < 6 and name[:1] != other[:1]):
        return None
    edits = _edits(name, other)
    return edits if edits <= (1 if shortest < 6 else 2) else None


def _one_edit_of_many(name: str, other: str) -> int | None:
    return 0 if min(len(name), len(other)) >= 6 and _edits(name, other) <= 1 else None


def _same_words(name: str, other: str) -> int | None:
    return 0 if _without_kind(_words(name)) == _without_kind(_words(other)) else None


def _first_words(name: str, other: str) -> int | None:
    words = name.split("_")
    if other.split("_")[: len(words)] == words:
        return 0
    return 1 if len(name) >= 4 and other.startswith(name) else None


def _last_words(name: str, other: str) -> int | None:
    words, own = _words(name), _without_kind(_words(other))
    is_kind_of = own[0] not in _VERBS and words[-1] == own[-1] and set(words) <= set(own)
    return 0 if is_kind_of else None


def _words(name: str) -> list[str]:
    """Return the words of a name, in the singular, without those that count."""
    words = name.split("_")
    while len(words) > 1 and words[0] in _COUNTING:
        words.pop(0)
    return [word.removesuffix("s") for word in words]


def _without_kind(words: list[str]) -> list[str]:
    return words[:-1] if len(words) > 1 and words[-1] in _KINDS else words


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


def names_of(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields, and of the tables that hold them."""
    for key in keys_of(model, prefix):
        yield key
        while (key := key.rpartition(".")[0]) and not key.endswith(ANY_NAME):
            yield key


def _nearest_key(location: Sequence[str], model: type[BaseModel]) -> str:
    """Return the hint for an unknown key: fields of its table, or of another, or options."""
    prefix, fields = _table_at(model, location[:-1])
    known = [*names_of(model), *OPTIONS]
    meant = [name.removeprefix(prefix) for name in close(prefix + location[-1], known)]
    if meant:
        return f"; did you mean {' or '.join(meant)}?; {FIELDS} shows all"
    return nearest(location[-1], fields, FIELDS)


def _table_at(model: type[BaseModel], location: Sequence[str]) -> tuple[str, Iterable[str]]:
    """Return how the names of the table at a place begin, and its fields."""
    prefix, named = "", False
    for part in location:
        info = None if named else model.model_fields.get(part)
        prefix += f"{ANY_NAME if info is None else part}."
        named = info is not None and get_origin(info.annotation) is dict
        model = (info and table_of(info.annotation)) or model
    return prefix, model.model_fields
