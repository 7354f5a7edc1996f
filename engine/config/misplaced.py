"""Find names of a task, an objective or a phase that stand in another table than their own."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from ..gradients.balancing import BalanceSettings
from .messages import FIELDS, nearest
from .objective import ObjectiveRecipe
from .tables import TaskRecipe

Fields = Mapping[str, Any]

_MODELS: Mapping[str, type[BaseModel]] = {"tasks": TaskRecipe, "objectives": ObjectiveRecipe}
_NEEDED = {"tasks": "head", "objectives": "kind"}
"""What a table of that kind always has, and so one that was created by mistake lacks."""
_NOUNS = {"tasks": "a task", "objectives": "an objective", "phases": "a phase"}


def misplaced(fields: Fields, given: Fields, of_recipe: Fields, of_phase: tuple[str, ...]) -> str:
    """Return what is wrong with a table that stands at the wrong place, or an empty text.

    Args:
        fields: of a recipe that is not valid, as parsed, overrides included.
        given: those of the overrides alone.
        of_recipe: the fields at the top, by name.
        of_phase: the settings that a phase may have.
    """
    allowed = {group: tuple(model.model_fields) for group, model in _MODELS.items()}
    allowed["phases"] = of_phase
    for group, name, field in _strays(fields, given, of_recipe, of_phase):
        where = ".".join(filter(None, (group, name, field)))
        own = [other for other in _groups_of(name, fields) if other != group]
        if not own:
            if line := _unknown_name(group, name, fields, given):
                return line
            continue
        meant = [f"{other}.{name}.{field}" for other in own if field in allowed[other]]
        if group == "balancing" and "tasks" in own and not field:
            meant = [f"balancing.preferences.{name}", f"tasks.{name}.weight"]
        is_a = f"{where}: {name} is {_NOUNS[own[0]]}"
        if meant:
            return f"{is_a}; did you mean {' or '.join(meant)}?"
        return f"{is_a}, whose fields stand below {own[0]}.{name}; {FIELDS} shows them"
    return ""


def phase_by_mistake(fields: Fields, given: Fields) -> str:
    """Return what is wrong with an override that makes a phase of a task, or an empty text.

    Such a recipe would be valid: of one phase, with the name of the task.

    Args:
        fields: as parsed from the file, without overrides.
        given: those of the overrides.
    """
    own = _names(fields, "phases")
    for name in _names(given, "phases"):
        table, groups = given["phases"][name], _groups_of(name, {**fields, "phases": {}})
        if name in own or not groups or not isinstance(table, dict) or "train" in table:
            continue
        for field in table:
            if field in _MODELS[groups[0]].model_fields:
                meant = f"{groups[0]}.{name}.{field}"
                return (
                    f"phases.{name}.{field}: {name} is {_NOUNS[groups[0]]}; did you mean {meant}? "
                    f"A phase of that name needs phases.{name}.train"
                )
    return ""


def _strays(
    fields: Fields, given: Fields, of_recipe: Fields, of_phase: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    """Yield group, name and first field of tables that are probably another's."""
    for group, needed in _NEEDED.items():
        for name in _names(fields, group):
            table = fields[group][name]
            if isinstance(table, dict) and needed not in table and "source" not in table:
                set_ = given.get(group, {}).get(name)
                yield group, name, next(iter(set_ if isinstance(set_, dict) else table), "")
    for name in _names(fields, "phases"):
        for field in fields["phases"][name]:
            if field not in of_phase:
                yield "phases", name, field
    for group, known in (("balancing", BalanceSettings.model_fields), ("", of_recipe)):
        table = fields.get(group, {}) if group else fields
        for name in table if isinstance(table, dict) else ():
            if name not in known:
                value = table[name]
                yield group, name, next(iter(value), "") if isinstance(value, dict) else ""


def _names(fields: Fields, group: str) -> list[str]:
    table = fields.get(group)
    return (
        [name for name in table if isinstance(table[name], dict)] if isinstance(table, dict) else []
    )


def _groups_of(name: str, fields: Fields) -> list[str]:
    """Return the tables where a name is whole: with what such a table needs."""
    found = [
        group
        for group, needed in _NEEDED.items()
        if name in _names(fields, group) and needed in fields[group][name]
    ]
    return [*found, *(["phases"] if name in _names(fields, "phases") else [])]


def _unknown_name(group: str, name: str, fields: Fields, given: Fields) -> str:
    """Return what is wrong with a table that overrides alone made, or an empty text."""
    known = [other for other in _names(fields, group) if group in _groups_of(other, fields)]
    if not known or group not in _MODELS or given.get(group, {}).get(name) != fields[group][name]:
        return ""
    if not fields[group][name].keys() <= _MODELS[group].model_fields.keys():
        return ""
    noun = _NOUNS[group].split()[1]
    hint = nearest(name, known)
    return f"{group}.{name}: no such {noun}{hint}; a new one needs {group}.{name}.{_NEEDED[group]}"
