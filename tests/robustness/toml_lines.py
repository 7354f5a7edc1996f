"""Values as TOML on one line, as ``--set`` takes them."""

import json
from typing import Any

import tomli_w


def toml_line(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        items = (f"{json.dumps(key)} = {toml_line(item)}" for key, item in value.items())
        return "{" + ", ".join(items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_line, value)) + "]"
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()
