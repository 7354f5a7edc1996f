"""A hook of mkdocs: the docstrings' cross references, ``:func:`~.pack.pack```, as plain names."""

import re
from typing import Any

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):<code>([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Show the name that a reference ends in, or all of it where it has no tilde."""
    return _ROLE.sub(lambda match: f"<code>{_shown(match[1])}</code>", html)


def _shown(target: str) -> str:
    name = target.lstrip("~.")
    return name.rsplit(".", 1)[-1] if target.startswith("~") else name
