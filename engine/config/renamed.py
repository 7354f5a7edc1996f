"""Fields of a recipe that were renamed: their old names still work (docs/policy.md)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

RENAMED: Mapping[str, str] = MappingProxyType(
    {
        "surgery": "balance_granularity",
        "order": "task_schedule",
        "limit": "max_train_examples",
        "watch_layers": "log_layer_cosines_every",
        "sinks": "loggers",
        "tasks.NAME.features": "tasks.NAME.head",
        "tasks.NAME.first": "tasks.NAME.first_n",
        "objectives.NAME.limit": "objectives.NAME.max_per_source",
    }
)
"""New names by old ones; a phase has those of the recipe."""

_TABLES = {"phases": "", "tasks": "tasks.NAME.", "objectives": "objectives.NAME."}
"""How fields of the tables below each of these begin in RENAMED."""


def with_new_names(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a recipe under their new names, and a line for each old one.

    Raises:
        ValueError: a table has a field by both names.
    """
    lines: list[str] = []

    def renamed(table: Mapping[str, Any], prefix: str, place: str) -> dict[str, Any]:
        found = {}
        for name, value in table.items():
            new = RENAMED.get(prefix + name, name).removeprefix(prefix)
            if new != name:
                lines.append(f"{place}{name} is {place}{new} now")
                if new in table:
                    raise ValueError(f"{lines[-1]}, and both are given; leave out {place}{name}")
            found[new] = value
        return found

    fields = renamed(fields, "", "")
    for group, prefix in _TABLES.items():
        tables = fields.get(group)
        if isinstance(tables, dict):
            own = {name: table for name, table in tables.items() if isinstance(table, dict)}
            fields[group] = tables | {
                name: renamed(table, prefix, f"{group}.{name}.") for name, table in own.items()
            }
    return fields, lines


def with_new_name(key: str, value: Any = None) -> tuple[str, Any, list[str]]:
    """Return a field's dotted key and its value, maybe a table, as :func:`with_new_names` does.

    Raises:
        ValueError: a table in ``value`` has a field by both names.
    """
    names = key.split(".")
    for name in reversed(names):
        value = {name: value}
    value, lines = with_new_names(value)
    for depth in range(len(names)):
        ((names[depth], value),) = value.items()
    return ".".join(names), value, lines
