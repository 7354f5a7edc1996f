"""A hook of mkdocs: usage and options of a command, made from the command's own parser.

``<!-- options: engine.train -->`` on a page becomes both; each option's row has an anchor, such as
``train--data``.
"""

import argparse
import html
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine.cli.parser import Parser

MARKER = re.compile(r"^<!-- options: (engine\.\w+) -->$", re.MULTILINE)
_WIDTH = 88


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the options in the places of their markers."""
    return MARKER.sub(lambda found: _options(found[1]), markdown)


def parser_of(module: str) -> Parser:
    """Return the parser of a command."""
    made: Parser = importlib.import_module(module).parser()
    return made


def _options(module: str) -> str:
    parser = parser_of(module)
    # As wide as a page, whatever the terminal of the build has.
    parser.formatter_class = _Formatter
    command = module.rpartition(".")[2]
    rows = "\n".join(_rows(parser, command))
    usage = parser.format_usage().removeprefix("usage: ")
    return (
        f"```text\n{usage}```\n\n"
        '<table class="options">\n<thead><tr><th>option</th><th>meaning</th></tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>"
    )


class _Formatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_WIDTH)


def _rows(parser: argparse.ArgumentParser, command: str) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction | argparse._VersionAction):
            continue  # the page says of both that every command has them
        names = ", ".join(action.option_strings) or _value(action)
        value = _value(action) if action.option_strings and action.nargs != 0 else ""
        anchor = command + (action.option_strings[-1] if action.option_strings else f"-{names}")
        text = (action.help or "") % {"prog": parser.prog}
        shown = html.escape(f"{names} {value}".strip())
        yield (
            f'<tr id="{html.escape(anchor)}"><td><code>{shown}</code></td>'
            f"<td>{html.escape(text)}</td></tr>"
        )


def _value(action: argparse.Action) -> str:
    name = action.metavar if isinstance(action.metavar, str) else None
    name = name or ("|".join(map(str, action.choices)) if action.choices else action.dest)
    return f"{name} …" if action.nargs in ("+", "*") else name
