"""``python -m engine.cache``: show what the cache of tokenized data holds, or remove from it."""

import time
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from .cli.common import Parser, run_cli, terminal
from .data.cache import default_cache
from .data.cached_entries import CachedEntry, entries_of, remove_abandoned, remove_entry
from .utils.quoting import one_line

_DAY = 24 * 60 * 60
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    root, console = default_cache(), terminal()
    entries = entries_of(root)
    doomed = _doomed(entries, options.unused_for, options.keep)
    removes = options.unused_for is not None or options.keep is not None
    if removes:
        for entry in doomed:
            remove_entry(entry)
        freed = decimal(sum(entry.size for entry in doomed))
        left = remove_abandoned(root)
        more = f", and {decimal(left)} that killed processes left" if left else ""
        console.print(f"removed {_count(len(doomed))}, {freed}{more}, of {root}", soft_wrap=True)
        entries = [entry for entry in entries if entry not in doomed]
    _print(console, entries, root)
    return 0


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.cache",
        description="Show what the cache of tokenized data holds: a line for each file of data, "
        "the last used first.  With an option below, remove what was not used for long, or is too "
        "much; a run that needs it makes it again.",
        epilog="The cache is $SUPERBERT_CACHE, or ~/.cache/superbert.",
    )
    add = made.add_argument_group("what to remove").add_argument
    add(
        "--unused-for",
        type=_days,
        metavar="DAYS",
        help="what was not used for so long (default: all stays)",
    )
    add(
        "--keep",
        type=_bytes,
        metavar="SIZE",
        help="the longest unused, until there is no more than this, such as 20G; 0: all "
        "(default: all stays)",
    )
    return made


def _doomed(
    entries: Sequence[CachedEntry], days: float | None, keep: int | None
) -> list[CachedEntry]:
    """Return the entries that are to be removed, of those of the cache, the last used first."""
    found, kept = list[CachedEntry](), 0
    for entry in entries:
        kept += entry.size
        is_old = days is not None and time.time() - entry.used > days * _DAY
        if is_old or (keep is not None and kept > keep):
            found.append(entry)
    return found


def _print(console: Console, entries: Sequence[CachedEntry], root: Path) -> None:
    table = Table("data", "what", "size", "last used")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(one_line(entry.data), one_line(entry.what), decimal(entry.size), used)
    if entries:
        console.print(table)
    total = decimal(sum(entry.size for entry in entries))
    console.print(f"{_count(len(entries))}, {total}, in {root}", soft_wrap=True)


def _count(entries: int) -> str:
    return "1 entry" if entries == 1 else f"{entries} entries"


def _days(text: str) -> float:
    """Return the days that an option was given.

    Raises:
        argparse.ArgumentTypeError: they are none.
    """
    try:
        days = float(text)
    except ValueError:
        days = -1
    if not 0 <= days < 1e6:
        raise ArgumentTypeError(f"{text!r}: invalid, give a number of days, such as 30")
    return days


def _bytes(text: str) -> int:
    """Return the size that an option was given.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "")
    try:
        size = float(number) * (_UNITS[unit] if unit else 1)
    except (KeyError, ValueError):
        size = -1
    if not 0 <= size < 1 << 60:
        raise ArgumentTypeError(f"{text!r}: invalid, give a size, such as 500M or 20G")
    return int(size)


if __name__ == "__main__":
    run_cli(main)
