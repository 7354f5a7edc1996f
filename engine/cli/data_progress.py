"""Show how far a large file is read: a bar on a terminal, a line now and then in a log."""

import time
from argparse import ArgumentTypeError, Namespace, _ActionsContainer
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.status import Status

from ..data.cache import Reading, Show
from .common import positive

_SILENT = 2.0
"""Seconds that a file may take unmentioned."""
_BETWEEN = 30.0
"""Seconds between lines of a log."""
_MOST = 1024
"""Processes that may be asked for."""


def add_reading(group: _ActionsContainer) -> None:
    """Add ``--workers`` and ``--verify-data``."""
    group.add_argument(
        "--workers",
        type=_workers,
        default=0,
        metavar="N",
        help="processes that tokenize a large file (default: as many as there are cores)",
    )
    group.add_argument(
        "--verify-data",
        action="store_true",
        help="read all of large files and of those at addresses to tell whether they have changed "
        "(default: their time, size and samples, or what a store says of them)",
    )


def _workers(text: str) -> int:
    """Return how many processes are asked for.

    Raises:
        argparse.ArgumentTypeError: none, or more than any machine needs.
    """
    if (count := positive(text)) > _MOST:
        raise ArgumentTypeError(f"{text!r}: expected {_MOST:,} or less")
    return count


def reading_of(options: Namespace, console: Console) -> Reading:
    """Return how data are read, by the options and with progress on a console."""
    return shown_on(console, Reading(options.workers, options.verify_data))


def shown_on(console: Console, reading: Reading) -> Reading:
    """Return a way to read data that shows progress on a console."""

    @contextmanager
    def watch(name: str, counted: str = "rows") -> Iterator[Show]:
        progress = _Progress(console, name, counted)
        try:
            yield progress.show
        finally:
            progress.close()

    return reading._replace(watch=watch)


class _Progress:
    """What is shown of one file."""

    def __init__(self, console: Console, name: str, counted: str) -> None:
        self._console, self._name, self._counted = console, name, counted
        self._begin = time.monotonic()
        self._next = self._begin + _SILENT
        self._status: Status | None = None

    def show(self, rows: int, share: float) -> None:
        """Show how many rows are done, and which share of the file is read."""
        now = time.monotonic()
        if now < self._next:
            return
        line = self._line(rows, share, now - self._begin)
        if not self._console.is_interactive:
            self._console.print(line, soft_wrap=True, highlight=False)
            self._next = now + _BETWEEN
            return
        if self._status is None:
            self._status = self._console.status(line)
            self._status.start()
        self._status.update(line)

    def _line(self, rows: int, share: float, seconds: float) -> str:
        whole, left = "", ""
        if share > 0:
            whole = f" of about {max(rows, round(rows / share, -3)):,.0f}"
            left = f", {timedelta(seconds=round(seconds * (1 - share) / share))} left"
        what, speed = self._counted, rows / seconds
        return f"reading {self._name}: {rows:,}{whole} {what}, {speed:,.0f} {what}/s{left}"

    def close(self) -> None:
        """Remove what is shown on a terminal."""
        if self._status is not None:
            self._status.stop()
