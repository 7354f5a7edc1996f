"""A hook of mkdocs: tables of a recipe's fields, made from the fields themselves.

``<!-- fields: lr schedule* -->`` on a page becomes a table of the fields that are named, a row each
with the field's name as its anchor; ``*`` stands for what is left of a part of a name.
``<!-- phase fields -->`` becomes links to the fields that a phase may set.
"""

import html
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.cli.help import RecipeField, recipe_fields
from engine.config.recipe import OF_A_PHASE

MARKER = re.compile(r"^<!-- fields:\s+([^>]*?)\s+-->$", re.MULTILINE)
_OF_A_PHASE = "<!-- phase fields -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in the places of their markers."""
    return MARKER.sub(lambda found: _table(chosen(found[1])), markdown).replace(
        _OF_A_PHASE, ", ".join(_phase_field(name) for name in OF_A_PHASE)
    )


def chosen(patterns: str) -> list[RecipeField]:
    """Return the fields that a marker names, in its order.

    Raises:
        ValueError: a name is no field's.
    """
    fields = list(recipe_fields())
    found = []
    for pattern in patterns.split():
        name = re.compile(re.escape(pattern).replace(r"\*", r"[^.]*"))
        own = [field for field in fields if name.fullmatch(field.key)]
        if not own:
            raise ValueError(f"{pattern}: no such field of a recipe")
        found += own
    return found


def _table(fields: Iterable[RecipeField]) -> str:
    head = "<tr><th>field</th><th>type</th><th>default</th><th>meaning</th></tr>"
    rows = "\n".join(_row(field) for field in fields)
    return f'<table class="fields">\n<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>'


def _row(field: RecipeField) -> str:
    default = _code(field.default) if field.default else ""
    cells = (_code(field.key), html.escape(field.type), default, _with_code(field.text))
    return f'<tr id="{field.key}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def _phase_field(name: str) -> str:
    tables = {"balancing": "balancing.fixed"}
    return f"[`{name}`](#{tables.get(name, name)})"


def _with_code(text: str) -> str:
    """Return the HTML of a docstring's text, whose code stands in double backticks."""
    text = re.sub(r":\w+:`~?\.?([^`]+)`", r"``\1``", text)
    by_turns: tuple[Callable[[str], str], ...] = (html.escape, _code)
    return "".join(by_turns[i % 2](one) for i, one in enumerate(text.split("``")))


def _code(text: str) -> str:
    # A long name may break behind its dots.
    return f"<code>{html.escape(text).replace('.', '.<wbr>')}</code>"
