"""The fields of a recipe by their dotted names, for help and for completion."""

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from ..config.messages import ANY_NAME, table_of
from ..config.recipe import Recipe
from ..config.tables import model_types
from ..gradients.balancing import METHODS
from ..optim.build import OPTIMIZERS
from .field_words import type_in_words

_DEFAULT_WIDTH = 12
"""Columns of a default in a line; few defaults are longer."""


class RecipeField(NamedTuple):
    """A field that ``--set`` takes.

    Attributes:
        key: such as ``lr`` or ``tasks.NAME.head``.
        default: as TOML; empty where there is none.
        choices: the values that it can have, where these are few.
        text: what it means.
        type: what it can be, in words.
    """

    key: str
    default: str
    choices: tuple[str, ...]
    text: str
    type: str


def recipe_fields() -> Iterator[RecipeField]:
    """Yield every field, tables by their own fields."""
    for field in _fields_of(Recipe, ""):
        if field.key == "balance":
            text = f"{field.text}  Methods: {', '.join(METHODS)}."
            field = field._replace(choices=tuple(METHODS), text=text)
        elif field.key == "optimizer":
            field = field._replace(choices=OPTIMIZERS)
        elif field.key == "encoder.model_type":
            text = f"{field.text[:-1]}: {' or '.join(model_types())}."
            field = field._replace(choices=model_types(), text=text)
        yield field


def print_fields(console: Console) -> None:
    """Print all fields with their whole names and texts.

    A terminal gets the text below the name, wrapped at its width; a pipe or file a line for each
    field, for ``grep``.
    """
    fields = [field._replace(text=field.text.replace("``", "")) for field in recipe_fields()]
    widest = max(len(field.key) for field in fields)
    for field in fields:
        if console.is_terminal:
            default = f" = {field.default}" if field.default else ""
            console.print(field.key + default, soft_wrap=True)
            console.print(Padding(Text(field.text), (0, 0, 0, 4)))
        else:
            line = f"{field.key:{widest}}  {field.default:{_DEFAULT_WIDTH}}  {field.text}"
            console.print(line.rstrip(), soft_wrap=True, highlight=False)


def _fields_of(model: type[BaseModel], prefix: str) -> Iterator[RecipeField]:
    for name, info in model.model_fields.items():
        key = prefix + name
        table = table_of(info.annotation)
        if table is not None:
            named = get_origin(info.annotation) is dict
            yield from _fields_of(table, f"{key}.{ANY_NAME}." if named else f"{key}.")
            continue
        text = " ".join((info.description or "").split())
        kind = type_in_words(info.annotation, info.metadata)
        yield RecipeField(key, _default(info), _choices(info.annotation), text, kind)


def _default(info: FieldInfo) -> str:
    if info.is_required() or info.default is None:
        return ""
    if isinstance(info.default, dict):
        pairs = ", ".join(f"{name} = {json.dumps(value)}" for name, value in info.default.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return json.dumps(info.default)  # of text, numbers and lists TOML is the same


def _choices(annotation: Any) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    return tuple(get_args(annotation)) if get_origin(annotation) is Literal else ()
