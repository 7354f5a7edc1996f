"""Parse a command's arguments; torch is not needed here."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from .. import __version__
from ..utils.errors import UNPRINTABLE

BAD_INPUT = 2
SCRIPT = "superbert"
"""The console script; ``superbert train`` is ``python -m superbert.engine.train``."""


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake with one line, and ``--version``."""

    def __init__(self, prog: str, description: str, epilog: str | None = None) -> None:
        if Path(sys.argv[0]).name == SCRIPT:
            prog = f"{SCRIPT} {prog.rpartition('.')[2]}"
        super().__init__(prog=prog, description=description, epilog=epilog)
        # Of all options that take text or a path: an unset shell variable leaves an empty one.
        self.register("type", None, given)
        self.register("type", Path, _given_path)
        version = f"superbert-engine {__version__}"
        self.add_argument("--version", action="version", version=version, help="show it and exit")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse arguments that a terminal and a file system can take."""
        for argument in sys.argv[1:] if args is None else args:
            if UNPRINTABLE.search(argument):
                self.error(f"{argument!a}: has control characters or is no text")
            if argument.startswith("--") and argument.endswith("=--"):  # argparse makes it a list
                self.error(f"{argument}: no value; give one")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(BAD_INPUT, f"error: {message}; see {self.prog} --help\n")


def given(text: str) -> str:
    """Return what an option was given.

    Raises:
        argparse.ArgumentTypeError: nothing, or spaces alone.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"{text!r} is no value; give one (is a shell variable unset?) or leave the option out"
        )
    return text


def _given_path(text: str) -> Path:
    return Path(given(text))
