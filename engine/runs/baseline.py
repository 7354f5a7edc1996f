"""Find the group that others are compared with, by settings: ``balance=sum,batch_size=16``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..config.messages import nearest
from ..config.renamed import with_new_name
from ..utils.errors import InputError
from ..utils.untrusted_io import parse_toml

OPTION = "--compare-to"

_NEXT = re.compile(r",(?=\s*[A-Za-z_][\w.-]*\s*=)")
"""The comma before a key; others are of a value, as in ``betas=[0.9,0.99]``."""
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")


class Place(NamedTuple):
    """Where a group belongs.

    Attributes:
        series: the name of its series; empty where there is one.
        recipe: the name of its recipe's folder.
        point: its settings, as overrides, without tuned ones.
    """

    series: str
    recipe: str
    point: tuple[str, ...]


def place_of(group: str, point: tuple[str, ...], series: str = "") -> Place:
    """Return the place of a group by its name, which begins with the recipe's folder."""
    return Place(series, group.partition("/")[0], point)


def split_settings(text: str) -> tuple[str, ...]:
    """Return the settings of ``key=value,key=value`` one by one.

    A comma within brackets or quotes belongs to a value, as in ``balancing.fixed={sst=1,sts=2}``.
    """
    found, begun = list[str](), list[str]()
    for part in _NEXT.split(text):
        begun.append(part)
        if not _is_open(",".join(begun)):
            found.append(",".join(begun))
            begun.clear()
    return tuple(setting.strip() for setting in (*found, *begun))  # what never closes


def _is_open(text: str) -> bool:
    """Return whether brackets or quotes of a text are still to be closed."""
    plain = _QUOTED.sub("", text)
    return not {*"\"'"}.isdisjoint(plain) or any(
        plain.count(one) > plain.count(other) for one, other in ("[]", "{}")
    )


def read_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Return the values of overrides by the fields' new names; ``1e-3`` is ``0.001``.

    Raises:
        InputError: one is not ``key=value``, or two are of one field.
    """
    found = dict[str, Any]()
    for setting in settings:
        key, value = _read(setting)
        if key in found:
            raise InputError(f"{OPTION} {setting}: {key} is given already; name each setting once")
        found[key] = value
    return found


def find_baselines(asked: str, groups: Mapping[str, Place]) -> dict[str, str]:
    """Return the baseline of each group, which is its own baseline or another group.

    It is the group whose point has the settings asked for, of the same recipe in the same series if
    there is one, else of the same recipe, else of any.  Of several, it is the one whose point has
    no settings besides.

    Args:
        asked: ``key=value,…``.
        groups: the place of each group, by its name.

    Raises:
        InputError: a group has no baseline, or several.
    """
    wanted = read_settings(split_settings(asked))
    points = {name: read_settings(place.point) for name, place in groups.items()}
    known = dict.fromkeys(key for point in points.values() for key in point)
    for key in wanted:
        if key not in known:
            hint = nearest(key, known) if known else "; they have no settings of their own"
            raise InputError(f"{OPTION} {asked}: no group is told by {key}{hint}")
    matching = [name for name, point in points.items() if wanted.items() <= point.items()]
    if not matching:
        raise InputError(
            f"{OPTION} {asked}: no group has these settings; {_values(wanted, points)}"
        )
    exact = {name for name in matching if points[name] == wanted}
    return {
        name: _nearest_of(asked, groups, place, matching, exact) for name, place in groups.items()
    }


def _nearest_of(
    asked: str, groups: Mapping[str, Place], own: Place, matching: Sequence[str], exact: set[str]
) -> str:
    """Return the matching group that is nearest to a place.

    Raises:
        InputError: several are as near.
    """
    for key in (_series_and_recipe, _recipe, _anywhere):
        near = [name for name in matching if key(groups[name]) == key(own)]
        found = [name for name in near if name in exact] or near
        if len(found) > 1:
            raise InputError(
                f"{OPTION} {asked}: several groups have these settings ({', '.join(found)}); give "
                "more of them, KEY=VALUE,KEY=VALUE"
            )
        if found:
            return found[0]
    raise AssertionError("some group matches")


def _series_and_recipe(place: Place) -> tuple[str, ...]:
    return place.series, place.recipe


def _recipe(place: Place) -> tuple[str, ...]:
    return (place.recipe,)


def _anywhere(_: Place) -> tuple[str, ...]:
    return ()


def _values(wanted: Iterable[str], points: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the values that there are of the keys asked for."""
    return "; ".join(
        f"values of {key}: "
        + ", ".join(dict.fromkeys(str(point[key]) for point in points.values() if key in point))
        for key in wanted
    )


def _read(setting: str) -> tuple[str, Any]:
    key, separator, text = setting.partition("=")
    if not separator or not key.strip() or not text.strip():
        raise InputError(f"{OPTION} {setting}: expected KEY=VALUE,…")
    try:
        value = parse_toml(f"value = {text}")["value"]
    except ValueError:
        value = text.strip()
    try:
        key, value, _ = with_new_name(key.strip(), value)
    except ValueError as error:
        raise InputError(f"{OPTION} {setting}: {error}") from None
    return key, value
