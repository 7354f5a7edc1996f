"""Random points of a search: draws of settings from distributions that are given by key.

``lr=log:1e-5:1e-3 dropout=uniform:0:0.3 batch_size=int:8:64 balance=choice:sum,pcgrad``

Each key has a stream of random numbers of its own, which follows from the seed and the key's name
alone: more keys leave the draws of the others as they are, and more draws begin with the fewer.
"""

import math
from collections.abc import Callable, Collection, Sequence
from random import Random
from typing import Any, NamedTuple

from ..config.messages import nearest
from ..config.renamed import with_new_name
from ..utils.errors import InputError
from ..utils.json_text import dump_json
from ..utils.untrusted_io import parse_toml

_DIGITS, _MOST_DIGITS = 4, 17
"""Significant digits of a drawn number, more in a narrow range: folders are named by the number
that is trained with."""

_LARGEST = 1 << 53
"""Whole numbers below it are exact in float64."""

_FORMS = "KEY=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or choice:VALUE,VALUE,…"


class Distribution(NamedTuple):
    """A distribution of one setting.

    Attributes:
        key: the field's dotted name, as it was given.
        field: its name now, where ``key`` is an old one.
        value_at: the value for a number that is uniform within [0, 1).
    """

    key: str
    field: str
    value_at: Callable[[float], Any]


def parse_distribution(text: str) -> Distribution:
    """Return the distribution that ``KEY=KIND:…`` describes.

    Bounds belong to the range, values of a choice are equally likely.

    Raises:
        InputError: it describes none, or one of a single value.
    """
    key, separator, given = text.partition("=")
    kind, colon, arguments = given.strip().partition(":")
    key = key.strip()
    if not separator or not key or not colon:
        raise InputError(f"--draw {text}: expected {_FORMS}")
    if kind not in _KINDS:
        raise InputError(f"--draw {text}: no such distribution: {kind}{nearest(kind, _KINDS)}")
    try:
        field, _, _ = with_new_name(key)
        return Distribution(key, field, _KINDS[kind](arguments))
    except ValueError as error:
        raise InputError(f"--draw {text}: {error}") from None


def random_points(
    texts: Sequence[str], count: int, seed: int, taken: Collection[str] = ()
) -> list[tuple[str, ...]]:
    """Return random points as overrides, each once, in the order in which they are drawn.

    Args:
        texts: ``KEY=KIND:…`` each.
        count: of the draws; as many points, or fewer where draws repeat one.
        seed: decides them, together with the names of the keys.
        taken: fields that have their values otherwise.

    Raises:
        InputError: a text describes no distribution, or one of a field that has one already.
    """
    axes, fields = [], set(taken)
    for text in texts:
        distribution = parse_distribution(text)
        if distribution.field in fields:
            raise InputError(
                f"--draw {text}: {distribution.field} is given already; name each field once"
            )
        fields.add(distribution.field)
        # Seeded by a text: random.Random hashes it with SHA-512, in every version of Python alike.
        stream = Random(f"{seed} {distribution.field}")
        values = [distribution.value_at(stream.random()) for _ in range(count)]
        axes.append([f"{distribution.key}={_spelt(value)}" for value in values])
    return list(dict.fromkeys(zip(*axes, strict=True)))


def _uniform(text: str) -> Callable[[float], float]:
    low, high = _bounds(text)
    return lambda u: _rounded(low * (1 - u) + high * u, low, high)


def _log_uniform(text: str) -> Callable[[float], float]:
    low, high = _bounds(text)
    if low <= 0:
        raise ValueError(f"LOW = {low:g} has no logarithm; give one above 0, or uniform")
    first, last = math.log(low), math.log(high)
    return lambda u: _rounded(math.exp(first * (1 - u) + last * u), low, high)


def _whole(text: str) -> Callable[[float], int]:
    bounds = _bounds(text)
    if not all(bound.is_integer() and abs(bound) < _LARGEST for bound in bounds):
        raise ValueError("expected two whole numbers; give them, or uniform")
    low, high = map(int, bounds)
    return lambda u: min(high, low + int(u * (high - low + 1)))


def _choice(text: str) -> Callable[[float], Any]:
    try:
        values = [_value(word) for word in split_values(text)]
    except ValueError:
        raise ValueError("expected choice:VALUE,VALUE,… without empty values") from None
    if len(values) < 2:
        raise ValueError("one value is no choice; give several, or this one by --set")
    return lambda u: values[int(u * len(values))]


_KINDS: dict[str, Callable[[str], Callable[[float], Any]]] = {
    "log": _log_uniform,
    "uniform": _uniform,
    "int": _whole,
    "choice": _choice,
}


def _bounds(text: str) -> tuple[float, float]:
    """Return LOW and HIGH of ``LOW:HIGH``.

    Raises:
        ValueError: these are no two finite numbers, or the range is empty.
    """
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"expected two numbers, LOW:HIGH, not {text!r}") from None
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("LOW and HIGH have to be finite")
    if low >= high:
        raise ValueError(
            f"the range from {low:g} to {high:g} is empty; give LOW below HIGH, "
            "or a single value by --set"
        )
    return low, high


def split_values(text: str) -> list[str]:
    """Split ``VALUE,VALUE,…`` at the commas that are in no value of TOML.

    A list, a table or a text in quotes is one value, and a word that is none ends at a comma.

    Raises:
        ValueError: a value is empty.
    """
    values, words = list[str](), text.split(",")
    while words:
        count = _words_of_first(words)
        values.append(",".join(words[:count]).strip())
        del words[:count]
    if not all(values):
        raise ValueError("expected VALUE,VALUE,… without empty values")
    return values


def _words_of_first(words: Sequence[str]) -> int:
    """Return how many of the words between commas the first value has."""
    if words[0].lstrip().startswith(("[", "{", '"', "'")):
        for count in range(1, len(words) + 1):
            if _is_toml(",".join(words[:count])):
                return count
    return 1


def _is_toml(text: str) -> bool:
    try:
        parse_toml(f"value = [{text}\n]")
    except ValueError:
        return False
    return True


def _value(text: str) -> Any:
    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _spelt(value: Any) -> str:
    """Return a value as an override reads it, without quotes where none are needed."""
    if isinstance(value, str) and value.strip() == value != "" and _value(value) == value:
        return value
    try:
        return dump_json(value)
    except TypeError:  # a date of TOML, which no field of a recipe takes
        return str(value)


def _rounded(value: float, low: float, high: float) -> float:
    """Return a number within bounds, rounded, but so that a range has hundreds of values."""
    size, width = max(abs(low), abs(high)) / 2, high / 2 - low / 2  # halves: the range may overflow
    digits = _DIGITS + max(0, round(math.log10(size / width))) if width else _MOST_DIGITS
    return min(high, max(low, float(f"{value:.{min(digits, _MOST_DIGITS)}g}")))
