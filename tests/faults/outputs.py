"""What lies where an output goes: nothing of anybody's may be changed, and nothing left elsewhere.

A case is a command that writes, and a circumstance at or around the name that it is given.  Some
hundred cases go through all of them once; links at the names that a run's folder has come too.
"""

import functools
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import scaling

from .base import DOORS, Base
from .cases import Case, Tried, try_cases
from .checks import changes, outcome_of, problems_of_end, problems_of_files, snapshot
from .children import Ended, call, command, opened

_NOBODY = 65534
_DEVICES = {"null": (1, 3), "full": (1, 7)}


def try_outputs(
    base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` cases: :func:`.try_cases`."""
    grid = [*itertools.product(COMMANDS, CIRCUMSTANCES), *_links_in_runs(base)]
    attempt = functools.partial(_attempt, base, grid, seed)
    return try_cases("outputs", folder, attempt, count, seed, only)


# Commands: (the folder of the case, target) -> door, arguments.

_Command = Callable[[Base, Path, Path], tuple[Any, list[str]]]


def _predict(base: Base, trial: Path, target: Path) -> tuple[Any, list[str]]:
    options = ["--task", "sst", "--input", str(trial / "rows.tsv"), "--device", "cpu"]
    return DOORS["predict"], [str(trial / "run"), *options, "--output", str(target)]


def _on_run(door: str, *options: str) -> _Command:
    """Return a command on the run of the case, whose last option names the target."""
    return lambda base, trial, target: (
        DOORS[door],
        [str(trial / "run"), *options, str(target)],
    )


def _training(*options: str) -> _Command:
    return lambda base, trial, target: (DOORS["train"], [*base.training(target), *options])


def _sweep(base: Base, trial: Path, target: Path) -> tuple[Any, list[str]]:
    return DOORS["sweep"], [*base.training(target), "--grid", "lr=1e-3"]


COMMANDS: dict[str, _Command] = {
    "train": _training(),
    "train --resume": _training("--resume"),
    "train --seeds": _training("--seeds", "1"),
    "sweep": _sweep,
    "predict": _predict,
    "export": _on_run("export", "--to"),
    "report": _on_run("report", "--device", "cpu", "--out"),
    "report --papers": _on_run("report", "--device", "cpu", "--papers", "--out"),
    "bench --json": lambda base, trial, target: (_Benchmark, ["--ranks=1", "--json", str(target)]),
}


class _Benchmark:
    """A benchmark as a door: it reads the command line itself."""

    @staticmethod
    def main(arguments: list[str]) -> int:
        sys.argv[1:] = arguments
        return scaling.main()


# Circumstances: put something at ``trial / "target"`` or around it; return the name to give.


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
    for name in ("vocab.txt", "config.json", "tokenizer.json"):
        (trial / "target" / name).write_text("somebody's\n")
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

# Links in a run's folder at the names that commands write there.

_ON_RUN: dict[str, Callable[[Base, Path], tuple[Any, list[str]]]] = {
    "train --resume": lambda base, run: (
        DOORS["train"],
        [*base.training(run, steps=3), "--resume"],
    ),
    "evaluate": lambda base, run: (DOORS["evaluate"], [str(run), "--device", "cpu"]),
}
_LINKS = {"a file": "theirs/notes.txt", "a folder": "theirs", "nothing": "theirs/new"}


def _links_in_runs(base: Base) -> list[tuple[str, ...]]:
    files = [path.relative_to(base.run) for path in sorted(base.run.rglob("*"))]
    names = {str(file) for file in files}
    names |= {"checkpoints/step-3", "metrics.json", "evaluations.jsonl"}
    names |= {f"{name}.partial" for name in names}
    return list(itertools.product(_ON_RUN, sorted(names), _LINKS))


def _attempt(base: Base, grid: list[tuple[str, ...]], seed: int, case: Case) -> Tried:
    chosen = case.pick(grid, seed) or case.draw.choice(grid)
    trial = case.folder / "here"
    (trial / "theirs" / "sub").mkdir(parents=True)
    (trial / "theirs" / "notes.txt").write_text("somebody's notes\n")
    (trial / "theirs" / "sub" / "x.json").write_text("{}\n")
    (trial / "empty").mkdir()
    shutil.copy(base.rows, trial)
    run = base.copy_run(trial / "run")
    if len(chosen) == 2:
        return _at_target(base, case, trial, *chosen)
    return _at_name(base, case, trial, run, *chosen)


def _at_target(base: Base, case: Case, trial: Path, name: str, circumstance: str) -> Tried:
    target = CIRCUMSTANCES[circumstance](trial)
    door, arguments = COMMANDS[name](base, trial, target)
    own: set[str] = set()
    if "an empty folder" in circumstance:
        own = {"empty"}  # may be replaced, being empty
    elif circumstance == "the run" and name == "train --resume":
        own = {str(path.relative_to(trial)) for path in (trial / "run").rglob("*")}
    below = os.path.relpath(os.path.realpath(target), os.path.realpath(trial))
    lower = functools.partial(_lower_rights, case.folder)
    as_nobody = circumstance == "a folder of another's"
    with (
        opened(target, os.O_RDONLY | os.O_NONBLOCK)
        if circumstance == "pipe"
        else opened(trial, os.O_RDONLY) as reader
    ):
        before = snapshot(trial)
        ended = call(
            command(door, arguments), case.folder, lower if as_nobody else lambda: None, 30.0
        )
        after = snapshot(trial)
        came = os.read(reader, 1) if circumstance == "pipe" and ended.status == 0 else b"x"
    problems = _problems(ended, trial, before, after, own, below)
    if not came:
        problems.append("done, but nothing came through the pipe")
    return Tried(f"{name}, {circumstance}", outcome_of(ended), problems, ended.last_line)


def _at_name(
    base: Base, case: Case, trial: Path, run: Path, name: str, file: str, link: str
) -> Tried:
    path = run / file
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(trial / _LINKS[link])
    door, arguments = _ON_RUN[name](base, run)
    before = snapshot(trial)
    ended = call(command(door, arguments), case.folder, seconds=30.0)
    # What lies in the run's folder is the command's own; what its links lead to is not.
    after = snapshot(trial)
    own = {name for name in before if name.startswith("run/")}
    problems = _problems(ended, trial, before, after, own, "run")
    if (file, link) == ("checkpoints", "a folder"):  # on another disk, say
        problems = [problem for problem in problems if not problem.startswith("left theirs/")]
    return Tried(
        f"{name}, {file} is a link to {link}", outcome_of(ended), problems, ended.last_line
    )


def _problems(
    ended: Ended,
    trial: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    own: set[str],
    below: str | None,
) -> list[str]:
    new_below = below if ended.status == 0 or own else None
    return [
        *problems_of_end(ended),
        *changes(before, after, own, new_below),
        *(problems_of_files(trial) if ended.status == 0 else ()),
    ]


def _lower_rights(folder: Path) -> None:
    """Become nobody, who owns the case's folder but for what is locked."""
    for path in (folder, *folder.rglob("*")):
        if path.name != "locked":
            os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)
    os.environ["SUPERBERT_CACHE"] = str(folder / "cache")
    os.setegid(_NOBODY)
    os.seteuid(_NOBODY)
