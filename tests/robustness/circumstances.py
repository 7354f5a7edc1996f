"""Commands that write, and what may lie at the name that they are given or around it.

A circumstance puts something at ``target`` in the folder of a case, or beside it, and returns the
name to give.  That folder has ``theirs``, an empty folder, rows to predict and a run.
"""

import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import scaling

from .base import PROGRAMS, Base

_DEVICES = {"null": (1, 3), "full": (1, 7)}
EMPTY = {"an empty folder", "link to an empty folder", "empty/new/.."}
"""Circumstances whose target is an empty folder, which may be replaced."""

_Command = Callable[[Base, Path, Path], tuple[Any, list[str]]]


def _predict(base: Base, trial: Path, target: Path) -> tuple[Any, list[str]]:
    options = ["--task", "sst", "--input", str(trial / "rows.tsv"), "--device", "cpu"]
    return PROGRAMS["predict"], [str(trial / "run"), *options, "--output", str(target)]


def _on_run(program: str, *options: str) -> _Command:
    """Return a command on the run of the case, whose last option names the target."""
    return lambda base, trial, target: (
        PROGRAMS[program],
        [str(trial / "run"), *options, str(target)],
    )


def _training(*options: str) -> _Command:
    return lambda base, trial, target: (PROGRAMS["train"], [*base.training(target), *options])


def _sweep(axis: str) -> _Command:
    return lambda base, trial, target: (PROGRAMS["sweep"], [*base.training(target), "--grid", axis])


COMMANDS: dict[str, _Command] = {
    "train": _training(),
    "train --resume": _training("--resume"),
    "train --seeds": _training("--seeds", "1"),
    "sweep": _sweep("lr=1e-3"),
    "sweep, out by its grid": _sweep("description=x,../../../theirs/new"),
    "predict": _predict,
    "export": _on_run("export", "--to"),
    "report": _on_run("report", "--device", "cpu", "--out"),
    "report --papers": _on_run("report", "--device", "cpu", "--papers", "--out"),
    "bench --json": lambda base, trial, target: (_Benchmark, ["--ranks=1", "--json", str(target)]),
}


class _Benchmark:
    """A benchmark as a program: it reads the command line itself."""

    @staticmethod
    def main(arguments: list[str]) -> int:
        sys.argv[1:] = arguments
        return scaling.main()


def _file(trial: Path) -> Path:
    (trial / "target").write_text("somebody's\n")
    return trial / "target"


def _named(*path: str) -> Callable[[Path], Path]:
    return lambda trial: trial.joinpath(*path)


def _full_folder(trial: Path) -> Path:
    return Path(shutil.copytree(trial / "theirs", trial / "target"))


def _vocabulary(trial: Path) -> Path:
    """A folder that is no run, with names that a run has."""
    (trial / "target").mkdir()
    (trial / "target" / "vocab.txt").write_text("somebody's\n")
    for name in ("config.json", "tokenizer.json"):
        (trial / "target" / name).write_text('"somebody\'s"\n')
    return trial / "target"


def _link(to: str) -> Callable[[Path], Path]:
    def make(trial: Path) -> Path:
        (trial / "target").symlink_to(to)
        return trial / "target"

    return make


def _pipe(trial: Path) -> Path:
    os.mkfifo(trial / "target")
    return trial / "target"


def _device(name: str) -> Callable[[Path], Path]:
    def make(trial: Path) -> Path:
        os.mknod(trial / "target", stat.S_IFCHR | 0o666, os.makedev(*_DEVICES[name]))
        return trial / "target"

    return make


def _hard_link(trial: Path) -> Path:
    os.link(trial / "theirs" / "notes.txt", trial / "target")
    return trial / "target"


def _beside(make: Callable[[Path], object]) -> Callable[[Path], Path]:
    """Put something where half-written output might go."""

    def both(trial: Path) -> Path:
        make(trial)
        (trial / "target").rename(trial / "target.partial")
        return trial / "target"

    return both


def _not_ours(trial: Path) -> Path:
    (trial / "locked").mkdir(mode=0o755)
    return trial / "locked" / "target"


CIRCUMSTANCES: dict[str, Callable[[Path], Path]] = {
    "nothing": _named("target"),
    "a new folder": _named("a", "b", "target"),
    "a file": _file,
    "below a file": _named("rows.tsv", "target"),
    "an empty folder": _named("empty"),
    "a full folder": _full_folder,
    "a vocabulary": _vocabulary,
    "link to a file": _link("theirs/notes.txt"),
    "link to a full folder": _link("theirs"),
    "link to an empty folder": _link("empty"),
    "dangling link": _link("nowhere"),
    "dangling link, deep": _link("no/where"),
    "link to itself": _link("target"),
    "pipe": _pipe,
    "null device": _device("null"),
    "full device": _device("full"),
    "hard link": _hard_link,
    "x/new/..": _named("theirs", "new", ".."),
    "the run/new/..": _named("run", "new", ".."),
    "empty/new/..": _named("empty", "new", ".."),
    "x/../y": _named("theirs", "sub", "..", "target"),
    ".": _named("theirs", "."),
    "the input": _named("rows.tsv"),
    "the run": _named("run"),
    "in the run": _named("run", "checkpoints"),
    "new in the run": _named("run", "target"),
    "the run's recipe": _named("run", "recipe.toml"),
    "target.partial: a file": _beside(_file),
    "target.partial: a folder": _beside(_full_folder),
    "target.partial: link to a file": _beside(_link("theirs/notes.txt")),
    "target.partial: link to a folder": _beside(_link("theirs")),
    "target.partial: a pipe": _beside(_pipe),
    "a folder of another's": _not_ours,
}

if os.geteuid() != 0:  # devices and folders of others are made by root alone
    for _name in ("null device", "full device", "a folder of another's"):
        del CIRCUMSTANCES[_name]

# Links in a run's folder at the names that commands write there.

ON_RUN: dict[str, Callable[[Base, Path], tuple[Any, list[str]]]] = {
    "train --resume": lambda base, run: (
        PROGRAMS["train"],
        [*base.training(run, steps=3), "--resume"],
    ),
    "evaluate": lambda base, run: (PROGRAMS["evaluate"], [str(run), "--device", "cpu"]),
}
LINKS = {"a file": "theirs/notes.txt", "a folder": "theirs", "nothing": "theirs/new"}


def links_in_runs(base: Base) -> list[tuple[str, ...]]:
    """Return commands, names in a run's folder, and where a link of that name leads."""
    files = [path.relative_to(base.run) for path in sorted(base.run.rglob("*"))]
    names = {str(file) for file in files}
    names |= {"checkpoints/step-3", "metrics.json", "evaluations.jsonl"}
    names |= {f"{name}.partial" for name in names}
    return list(itertools.product(ON_RUN, sorted(names), LINKS))
