"""Report bad input and print scores, for all commands."""

import argparse
import glob
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from os.path import exists, isdir
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from ..config.recipe import Recipe
from ..data.addresses import Address, Place, is_address
from ..runs.scoring import score_names
from ..runtime.oom import is_out_of_memory
from ..utils.errors import DivergedError, InputError, LostRankError
from ..utils.quoting import PlainConsole
from .parser import BAD_INPUT, given
from .parser import Parser as Parser  # where the commands and benchmarks look for it
from .standard_output import exit_with

DIED = 1
"""A run of a series died twice, as an exception that nobody expects ends a command."""
DIVERGED = 3
"""Training left the finite numbers; what was good before stays."""
STOPPED = 128
"""Added to the number of the signal that stopped a run: 130 for SIGINT, 143 for SIGTERM."""
LOST_RANK = 75
"""``EX_TEMPFAIL``: started again, the run goes on."""


def positive(text: str) -> int:
    """Return the whole number from 1 on that an option was given.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.strip().isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 on")
    return int(text)


def one_file(text: str) -> Place:
    """Return the file that an option was given, by its path or address.

    Raises:
        argparse.ArgumentTypeError: it is a folder, or a pattern for several files.
    """
    if is_address(text):
        return Address(text)
    if isdir(given(text)) or (glob.has_magic(text) and not exists(text)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: not one file; give one, or name a folder or pattern as a split of the task "
            "in the recipe, for --split"
        )
    return Path(text)


def run_cli(main: Callable[[], int]) -> NoReturn:
    """Run a command's main function and exit with its status; bad input is one line and status 2.

    What happens where nothing can be printed any more says :mod:`engine.cli.standard_output`.
    """
    exit_with(lambda: status_of(main))


def status_of(main: Callable[[], int]) -> int:
    """Run a command's main function and return its status, as :func:`run_cli` exits with."""
    return _end_rank(_status(main))


def _status(main: Callable[[], int]) -> int:
    try:
        return main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED if isinstance(error, DivergedError) else BAD_INPUT
    except KeyboardInterrupt:
        return STOPPED + signal.SIGINT
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = "free some, or take a smaller model or less input"
        print(f"error: out of memory: {what}", file=sys.stderr)
        return BAD_INPUT
    except LostRankError as error:
        print(f"error: {error}; start again with --resume", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(LOST_RANK)  # threads may wait for the lost rank, and exiting for them


def _end_rank(status: int) -> int:
    """End a rank that is still connected to others at once, or return the status.

    Gloo's threads may abort a process that exits without leaving its groups, which would wait for
    ranks that are lost.
    """
    if dist.is_available() and dist.is_initialized():
        with suppress(OSError, ValueError):
            sys.stderr.flush()
            sys.stdout.flush()
        os._exit(status)
    return status


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():  # which alone hears of it
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise SystemExit(STOPPED + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_warnings(lines: Iterable[str]) -> None:
    """Print warnings on stderr, each once."""
    for line in dict.fromkeys(lines):
        print(f"warning: {line}", file=sys.stderr)


def terminal(*, quiet: bool = False, stderr: bool = False) -> Console:
    """Return a command's console, which takes nothing in names of files or tasks for markup."""
    return PlainConsole(quiet=quiet, stderr=stderr, markup=False, emoji=False)


def print_scores(console: Console, title: str, scores: Mapping[str, float], recipe: Recipe) -> None:
    """Print a table of scores by task and metric, ``overall`` last."""
    console.print(title)
    table = Table()
    table.add_column("task")
    table.add_column("metric")
    table.add_column("score", justify="right")
    for name, (task, metric) in score_names(recipe).items():
        if name in scores:
            table.add_row(task if name == task else "", metric, f"{scores[name]:.3f}")
    table.add_section()
    table.add_row("overall", "mean", f"{scores['overall']:.3f}")
    console.print(table)
