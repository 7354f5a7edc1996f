"""Two processes at once on one folder: one of them works there, the other gets a line.

The second starts after a random part of a second, and in a third of the cases the first is killed:
what it held must then be free.
"""

import functools
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.cli.common import BAD_INPUT

from .base import PROGRAMS, Base
from .cases import Case, Tried, try_cases
from .checks import outcome_of, problems_of_end, problems_of_files, problems_of_run
from .children import Child, Ended, call, command

_STEPS = 12
_MOMENTS = 0.5
"""Seconds within which the second process starts."""


def try_concurrent(
    base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` pairs of processes: :func:`.try_cases`."""
    return try_cases("concurrent", folder, functools.partial(_attempt, base), count, seed, only)


def _pairs(base: Base, folder: Path) -> dict[str, tuple[tuple[str, list[str]], ...]]:
    """Return pairs of commands, by what is special about them."""
    run, other = folder / "run", folder / "other"
    training = ("train", base.training(run, steps=_STEPS))
    resuming = ("train", [*training[1], "--resume"])
    series = ("train", [*base.training(run), "--seeds", "2"])
    sweep = ("sweep", base.training(run))
    made = str(base.run)
    export = ("export", [made, "--to", str(run)])
    report = ("report", [made, "--out", str(run)])
    predicting = ["--task", "sst", "--input", str(base.rows), "--output", str(run)]
    return {
        "train, train": (training, training),
        "train, resume": (training, resuming),
        "resume, resume": (resuming, resuming),
        "resume, resume again": (resuming, resuming),
        "seeds, seeds": (series, series),
        "seeds, sweep": (series, sweep),
        "sweep, sweep": (sweep, sweep),
        "train, evaluate": (training, ("evaluate", [str(run)])),
        "train, report": (training, ("report", [str(run), "--out", str(other)])),
        "export, export": (export, export),
        "report, report": (report, report),
        "predict, predict": (("predict", [made, *predicting]),) * 2,
        "train, train elsewhere": (training, ("train", base.training(other, steps=_STEPS))),
    }


def _attempt(base: Base, case: Case) -> Tried:
    pairs = _pairs(base, case.folder)
    name = case.draw.choice(list(pairs))
    first, second = (command(PROGRAMS[program], arguments) for program, arguments in pairs[name])
    killed = name.startswith("resume") and case.draw.random() < 0.5
    cache = functools.partial(_use_cache, case.folder / "cache")
    places = [case.folder / which for which in ("first", "second")]
    for place in places:
        place.mkdir()
    one = Child(first, places[0], cache)
    time.sleep(case.draw.uniform(0, _MOMENTS))
    two = Child(second, places[1], cache)
    if killed:
        time.sleep(case.draw.uniform(0, _MOMENTS))
        one.kill(signal.SIGKILL)
    ends = [one.wait(), two.wait()]
    alive = ends[1:] if killed and ends[0].status == -signal.SIGKILL else ends
    problems = [problem for end in alive for problem in problems_of_end(end)]
    if not problems:
        problems = list(_problems_together(name, case.folder, ends, alive))
    if killed and not problems:
        again = call(first, case.folder, cache)
        if again.status != 0:
            problems.append(f"after a kill: {again.error[-200:]}")
        problems += _left(case.folder)
    outcomes = " and ".join(map(outcome_of, ends))
    return Tried(f"{name}{', first killed' if killed else ''}", outcomes, problems)


def _use_cache(folder: Path) -> None:
    os.environ["SUPERBERT_CACHE"] = str(folder)


def _problems_together(
    name: str, folder: Path, ends: list[Ended], alive: list[Ended]
) -> Iterator[str]:
    statuses = [end.status for end in ends]
    if len(alive) == len(ends) and 0 not in statuses:
        yield f"neither was done: {ends[0].error[-150:]} {ends[1].error[-150:]}"
    if name in ("train, train", "export, export") and statuses == [0, 0]:
        yield "both wrote the one folder, and say that they are done"
    if name == "train, train elsewhere" and statuses != [0, 0]:
        yield f"each has a folder of its own: {ends[statuses.index(BAD_INPUT)].error[-150:]}"
    yield from problems_of_files(folder)
    for recipe in folder.rglob("recipe.toml"):
        yield from problems_of_run(recipe.parent)
        yield from _problems_of_steps(recipe.parent)
    if len(alive) == len(ends):  # what was killed leaves the rest of its work to the next one
        yield from _left(folder)


def _left(folder: Path) -> Iterator[str]:
    """Yield the files that are not whole."""
    for left in folder.rglob("*.partial"):
        yield f"{left.relative_to(folder)} was left"


def _problems_of_steps(run: Path) -> Iterator[str]:
    """Yield whether a run's metrics have other steps than 0, 1, 2, …"""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    if steps != list(range(len(steps))):
        yield f"metrics.jsonl has the steps {steps}"
