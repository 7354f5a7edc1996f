"""The fields that a recipe gives, and the phases in which each of them counts."""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from ..config.messages import ANY_NAME
from ..config.recipe import Recipe
from ..utils.field_types import Settings


class Given(NamedTuple):
    """A field, or a table, that a recipe gives.

    Attributes:
        key: its name.
        known_as: its name among ``--fields``.
        owner: the task or objective that it belongs to, if any.
        value: what it is set to.
        split: the split that it is of alone, if any.
    """

    key: str
    known_as: str
    owner: str
    value: Any
    split: str = ""


def given_fields(recipe: Recipe) -> Iterator[tuple[Given, list[str]]]:
    """Yield what a recipe gives, and the names of the phases that it counts in."""
    phases = recipe.in_phases
    fields, required = Recipe.model_fields, {"train"}
    # A run's own recipe.toml says everything; what it leaves as it is was not asked for.
    changed = recipe.model_fields_set >= fields.keys()
    for given in _given_in(recipe, recipe.model_fields_set - required, changed=changed):
        field = given.known_as.partition(".")[0]
        yield given, [name for name in phases if field not in recipe.phases.get(name, ())]
    for name, own in recipe.phases.items():
        for given in _given_in(phases[name], own.keys()):
            yield given._replace(key=f"phases.{name}.{given.key}"), [name]


def _given_in(
    table: Settings,
    names: Collection[str],
    key: str = "",
    known_as: str = "",
    owner: str = "",
    split: str = "",
    *,
    changed: bool = False,
) -> Iterator[Given]:
    """Yield fields of a table, those of tables in it by their own, all or what was changed."""
    for name, info in type(table).model_fields.items():
        value = getattr(table, name)
        if name not in names or (changed and value == info.get_default()):
            continue
        tables = {"": value} if isinstance(value, Settings) else value
        if not (isinstance(tables, dict) and all(isinstance(t, Settings) for t in tables.values())):
            yield Given(key + name, known_as + name, owner, value, split)
            continue
        for own, inner in tables.items():
            its_key = f"{key}{name}.{own}".rstrip(".")
            its_name = f"{known_as}{name}.{ANY_NAME}" if own else f"{known_as}{name}"
            its_owner, its_split = owner or own, own if owner else ""
            yield Given(its_key, its_name, its_owner, inner, its_split)
            yield from _given_in(
                inner,
                inner.model_fields_set,
                f"{its_key}.",
                f"{its_name}.",
                its_owner,
                its_split,
                changed=changed,
            )
