"""The options of every command at their edges, stdout and stderr that fail, and too little memory.

Options, their types and choices are those of the commands' own parsers.  Stdout may be closed, a
full device, a pipe or a terminal whose reader leaves; what was trained then is whole.
"""

import argparse
import contextlib
import functools
import os
import pty
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from engine.cli.common import Parser

from .base import PROGRAMS, TINY, Base
from .cases import Case, Tried, try_cases
from .checks import outcome_of, problems_of_end, problems_of_run
from .children import ROOM, Child, Ended, command, little_room

_TEXTS = [
    *("", " ", "x", "-1", "0", "1", "2", "9" * 40, "1e400", "nan", "inf", "-inf", "0.5", "--", "-"),
    *(
        "٣",
        "²",
        "\x1b[2J",
        "a\nb",
        "\0",
        "\udcff",
        "é",
        "x=",
        "=x",
        "lr=",
        "lr=1e-3,nan",
        "lr=1,,2",
    ),
    *("/dev/null", "..", "a/../b", "a" * 300, "data='..'", "lr=../x", "seed=1,2", "cpu", "cuda:99"),
    *("[MASK]", "[MASK] [MASK]", "=1+1", "x" * 10_000, "meta", "cpu:7", "mps", "true"),
]
_LOOKS = (["--list"], ["--fields"], ["--completion", "bash"], ["--help"], ["--version"])


def try_options(
    base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` command lines: :func:`.try_cases`."""
    return try_cases("options", folder, functools.partial(_attempt, base), count, seed, only)


def _attempt(base: Base, case: Case) -> Tried:
    name = case.draw.choice([*PROGRAMS, "train"])
    arguments = _good(base, case.folder)[name]
    if case.draw.random() < 0.6:
        arguments = _changed(name, arguments, case)
    elif name == "train" and case.draw.random() < 0.5:
        arguments = case.draw.choice(_LOOKS)
    out = case.draw.choice([None, None, *STREAMS])
    error = case.draw.choice([None, None, None, *STREAMS])
    room = ROOM if case.draw.random() < 0.8 else little_room(case.draw)
    ended = _call(name, arguments, case.folder, out, error, room)
    readable = error is None
    problems = [
        problem
        for problem in problems_of_end(ended, on_terminal="terminal" in (out, error))
        if readable or "its last line" not in problem
        if not (problem.startswith("done, and says") and {"nan", "inf"} & {*arguments})  # a name
    ]
    if name == "train" and ended.status == 0 and (case.folder / "run").exists():
        problems += problems_of_run(case.folder / "run")
    streams = f", stdout {out or 'a file'}, stderr {error or 'a file'}"
    if room != ROOM:
        streams += f", in {room:,} bytes"
    shown = (" ".join([name, *arguments]) + streams).replace(" ".join(TINY), "TINY")
    return Tried(shown.replace(str(case.folder), "."), outcome_of(ended), problems, ended.last_line)


def _good(base: Base, trial: Path) -> dict[str, list[str]]:
    """Return arguments of every command with which it is done."""
    new = str(trial / "new")
    run = str(base.copy_run(trial / "old"))
    predict = ["--task", "sst", "--input", str(base.rows), "--output", new]
    training = base.training(trial / "run")
    return {
        "train": training,
        "evaluate": [run],
        "predict": [run, *predict],
        "export": [run, "--to", new],
        "report": [run, "--out", new],
        "sweep": training,
        "fill": [run],
    }


def _changed(name: str, arguments: list[str], case: Case) -> list[str]:
    """Return the arguments with one to three options or values more, or fewer."""
    changed, draw = list(arguments), case.draw
    for _ in range(draw.randint(1, 3)):
        action = draw.choice(actions(name))
        values = [*map(str, action.choices or []), *_TEXTS]
        given = [draw.choice(action.option_strings)] if action.option_strings else []
        if action.nargs != 0:
            given += draw.choices(values, k=draw.choice([1, 1, 1, 0, 2]))
        if "--papers" in given and name == "sweep":
            continue  # which would train all recipes
        # What is given last wins; before --set, whose values would go on.
        at = changed.index("--set") if "--set" in changed else len(changed)
        changed[at:at] = given
        if changed and draw.random() < 0.1:
            del changed[draw.randrange(len(changed))]
    return changed


@functools.cache
def actions(name: str) -> list[argparse.Action]:
    """Return what the parser of a command takes."""
    parsers = list[Parser]()

    def caught(parser: Parser, *_given: object) -> None:
        parsers.append(parser)
        raise SystemExit

    with (
        mock.patch.object(Parser, "parse_args", caught),
        contextlib.suppress(SystemExit),
    ):
        PROGRAMS[name].main([])
    return parsers[0]._actions


# Streams: what a descriptor of the child is, and what happens at the other end meanwhile.


class Stream(NamedTuple):
    """A stream as the child gets it.

    Attributes:
        handle: a descriptor; None: closed.
        leave: called while the child runs, in a thread.
    """

    handle: int | None
    leave: Callable[[], object] = lambda: None


def _unread(_trial: Path) -> Stream:
    reading, writing = os.pipe()
    os.close(reading)
    return Stream(writing)


def _left(reading: int, writing: int) -> Stream:
    """Return a stream whose reader leaves after the first piece."""

    def leave() -> None:
        with contextlib.suppress(OSError):
            os.read(reading, 100)
        os.close(reading)

    return Stream(writing, leave)


STREAMS: dict[str, Callable[[Path], Stream]] = {
    "closed": lambda _trial: Stream(None),
    "full": lambda _trial: Stream(os.open("/dev/full", os.O_WRONLY)),
    "unread": _unread,
    "read once": lambda _trial: _left(*os.pipe()),
    "terminal": lambda _trial: _left(*pty.openpty()),
}


def _call(
    name: str, arguments: list[str], trial: Path, out: str | None, error: str | None, room: int
) -> Ended:
    """Run a command on the given streams, with room in memory for so many bytes more."""
    kinds = {1: out, 2: error}
    streams = {number: STREAMS[kind](trial) for number, kind in kinds.items() if kind is not None}

    def prepare() -> None:
        os.environ.setdefault("TERM", "xterm")
        os.chdir(trial)
        for number, stream in streams.items():
            if stream.handle is None:
                os.close(number)
            else:
                os.dup2(stream.handle, number)
        os.closerange(3, 256)  # the other ends among them

    child = Child(command(PROGRAMS[name], arguments), trial, prepare, room)
    readers = [threading.Thread(target=stream.leave) for stream in streams.values()]
    for stream, reader in zip(streams.values(), readers, strict=True):
        if stream.handle is not None:
            os.close(stream.handle)  # the child alone writes
        reader.start()
    ended = child.wait()
    for reader in readers:
        reader.join()
    return ended
