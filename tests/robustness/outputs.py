"""Outputs whose place is taken: no other file may change, and nothing be left elsewhere.

A case is a command that writes, and a circumstance at or around the name that it is given.  Some
hundred cases go through all of them once; links at the names that a run's folder has come too.
"""

import functools
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

from .base import Base
from .cases import Case, Tried, try_cases
from .checks import changes, outcome_of, problems_of_end, problems_of_files, snapshot
from .children import Ended, call, command, opened
from .circumstances import CIRCUMSTANCES, COMMANDS, EMPTY, LINKS, ON_RUN, links_in_runs

_NEEDS_ROOM = {"train", "train --resume", "export"}
"""Commands that are given a new or empty folder, or, to resume, a run."""
_NOBODY = 65534


def try_outputs(
    base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` cases: :func:`.try_cases`."""
    grid = [*itertools.product(COMMANDS, CIRCUMSTANCES), *links_in_runs(base)]
    attempt = functools.partial(_attempt, base, grid, seed)
    return try_cases("outputs", folder, attempt, count, seed, only)


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
    program, arguments = COMMANDS[name](base, trial, target)
    real = Path(os.path.realpath(target))
    below = os.path.relpath(real, os.path.realpath(trial))
    is_full = real.is_dir() and any(real.iterdir())
    own: set[str] = set()
    if circumstance in EMPTY:
        own = {"empty"}
    elif circumstance in ("the run", "the run/new/..") and name == "train --resume":
        own = {str(path.relative_to(trial)) for path in (trial / "run").rglob("*")}
    elif is_full and name in _NEEDS_ROOM:
        below = None
    prepare = (
        functools.partial(_lower_rights, case.folder) if real.parent.name == "locked" else None
    )
    is_pipe = circumstance == "pipe"
    with opened(target if is_pipe else trial, os.O_RDONLY | os.O_NONBLOCK) as reader:
        before = snapshot(trial)
        ended = call(command(program, arguments), case.folder, prepare)
        after = snapshot(trial)
        came = not is_pipe or ended.status != 0 or os.read(reader, 1)
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
    path.symlink_to(trial / LINKS[link])
    program, arguments = ON_RUN[name](base, run)
    before = snapshot(trial)
    ended = call(command(program, arguments), case.folder)
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
