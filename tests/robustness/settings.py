"""Every field of a recipe at the edges of its type, alone and in pairs, through steps of training.

Fields and types are those of the recipe's JSON schema, so that a new field is tried by itself.  A
run ends with weights and scores that are finite, or with one line.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from engine.config.recipe import Recipe
from engine.gradients.balancing import METHODS
from engine.models.heads.masked_lm import MaskedLmHead

from .base import PROGRAMS, Base
from .cases import Case, Tried, try_cases
from .checks import outcome_of, problems_of_end, problems_of_files, problems_of_run
from .children import ROOM, call, command, little_room
from .toml_lines import toml_line

_NUMBERS: list[Any] = [
    *(0, 1, -1, 3, 1000, 10**6, 2**31, 2**63, 10**40, 0.5, 1e-45, 1 - 1e-9, 1e18, 3.4e38, 1e308),
    *(float("nan"), float("inf"), True, "1"),
]
_TEXTS: list[Any] = [
    *("", " ", "x", "x" * 5000, "\x1b[2J", "a\rb", "a\nb", "../x", "=1+1", "$x", "[/red]", "nan"),
    *("\u202e", "\U0001f4a3", "type", "self", "train", "/dev/zero", 0),
]
_LISTS: list[Any] = [[], ["sst"], ["sst", "sst"], ["x"], ["sst", "quora", "lm"], [1], [0, 0], "sst"]
_TABLES: list[Any] = [{}, {"x": 1}, {"sst": 0}, {"sst": -1}, {"sst": 3.4e38}, {"train": "../x.csv"}]
_MODEST = ("encoder.hidden_size=256", "encoder.num_hidden_layers=4", "batch_size=30")
"""Settings of a run for which memory is short."""
_LONG_WORK = {("execution", "compile"), ("batch_size", 10**6)}
"""Settings that rightly take long."""
_MODULES = (nn.Module, nn.ModuleDict, MaskedLmHead, dict)

_SOURCE = {
    "kind": "classification",
    "text": ["sentence"],
    "label": "sentiment",
    "id": "id",
    "classes": 5,
    "files": {"train": "ids-sst-train.csv", "dev": "ids-sst-dev.csv"},
    "delimiter": "tab",
}
WHOLE = {
    "tasks": {"sst": {"head": "single"}, "own": {"head": "single", "source": _SOURCE}},
    "objectives": {"lm": {"kind": "masked_lm"}},
    "phases": {"one": {"lr": 1e-4}, "two": {"lr": 1e-3}},
}
"""Paths of fields of a table in a table, the tables around it as they have to be."""


def try_settings(
    base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` settings: :func:`.try_cases`.

    Each number has one of its own as long as there are any; the cases beyond take two at a time, or
    leave a run too little memory.
    """
    grid = [*_singles(), *_names(), *((f"balance={method}",) for method in METHODS)]
    attempt = functools.partial(_attempt, base, grid, seed)
    return try_cases("settings", folder, attempt, count, seed, only)


Setting = tuple[str, ...]
"""Overrides that go together."""


def _attempt(base: Base, grid: list[Setting], seed: int, case: Case) -> Tried:
    one = case.pick(grid, seed)
    settings = one or tuple(item for pair in case.draw.sample(grid, 2) for item in pair)
    room = ROOM
    if one is None and case.draw.random() < 0.3:
        settings, room = _MODEST, little_room(case.draw)
    run = case.folder / "run"
    arguments = base.training(run, "epochs=2", *settings)
    ended = call(command(PROGRAMS["train"], arguments), case.folder, room=room)
    problems = list(problems_of_end(ended))
    if ended.status == 0:
        problems += [*problems_of_files(run), *problems_of_run(run)]
    elif run.exists() and not (run / "metrics.jsonl").exists() and not problems:
        problems.append("refused before the first step, and left a folder")
    what = " ".join(settings).replace(toml_line(_SOURCE), "SOURCE") + (
        f" in {room:,} bytes" if settings == _MODEST else ""
    )
    return Tried(what, outcome_of(ended), problems, ended.last_line)


def _singles() -> Iterator[Setting]:
    """Yield every field with every value."""
    schema = Recipe.model_json_schema()
    for path, field in _fields(schema, schema["$defs"], ()):
        around = tables_around(path)
        for value in _values(field):
            name = ".".join(path)
            if not any((name, value) == long for long in _LONG_WORK):
                yield (*around, f"{name}={toml_line(value)}")


def _fields(
    schema: dict[str, Any], defs: dict[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield the dotted names of all fields with their schemas; tables by name have one entry."""
    for name, field in schema["properties"].items():
        here = (*path, name)
        yield here, field
        for option in [field, *field.get("anyOf", [])]:
            if "$ref" in option:
                yield from _fields(defs[option["$ref"].rpartition("/")[2]], defs, here)
            elif "$ref" in (below := option.get("additionalProperties") or {}):
                table = defs[below["$ref"].rpartition("/")[2]]
                entry = {"tasks": "own", "objectives": "lm", "of_split": "dev"}[name]
                yield from _fields(table, defs, (*here, entry))


def tables_around(path: tuple[str, ...]) -> Setting:
    """Return the settings without which a field of a table in a table would not count."""
    if path[0] in ("tasks", "objectives") and len(path) > 1:
        train = ["own"] if path[0] == "tasks" else ["sst", "lm"]
        tables = dict.fromkeys(("tasks", path[0]))
        return (
            f"train={toml_line(train)}",
            *(f"{name}={toml_line(WHOLE[name])}" for name in tables),
        )
    return ()


def _values(field: dict[str, Any]) -> list[Any]:
    """Return values at the edges of a field's type, and some of other types."""
    if "anyOf" in field:
        return [value for option in field["anyOf"] for value in _values(option)]
    match field.get("type"):
        case "integer" | "number":
            edges = [field[key] for key in ("minimum", "maximum") if key in field]
            return [*_NUMBERS, *edges]
        case "boolean":
            return [True, False, 0, "yes"]
        case "string":
            return [*field["enum"], "x", ""] if "enum" in field else _TEXTS
        case "array":
            return [*_LISTS, *([item] for item in _values(field.get("items", {}))[:8])]
        case "object":
            return _TABLES
    return [0, "", [], {}]


def _names() -> Iterator[Setting]:
    """Yield tasks, objectives, phases and classes under names that something else has."""
    attributes = sorted({name for module in _MODULES for name in dir(module)} | {"overall", "pair"})
    for name in attributes:
        task = {name: {"head": "single", "source": _SOURCE}}
        yield (f"tasks={toml_line(task)}", f"train={toml_line([name])}")
    for name in [name for name in attributes if not name.startswith("__")][::3]:
        yield (
            f"objectives={toml_line({name: {'kind': 'masked_lm'}})}",
            f"train={toml_line(['sst', name])}",
        )
    for phases in ({"a": {"train": ["lm"]}, "b": {}}, {"..": {}}, {"": {}}, {"x/y": {"lr": 1.0}}):
        yield (
            f"objectives={toml_line(WHOLE['objectives'])}",
            f"phases={toml_line(phases)}",
        )
    source = _SOURCE | {"classes": 3000}
    yield (f"tasks={toml_line({'own': {'head': 'single', 'source': source}})}", "train=['own']")
