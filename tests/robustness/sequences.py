"""Run commands one after the other on the same folders, with kills and corrupted files between.

The settings of each folder are noted, and the output of later commands is checked against them;
once something was corrupted or was not finite, a refusal is right as well.  A run that was stopped
goes on under the same settings.
"""

import functools
import itertools
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.cli.common import BAD_INPUT, STOPPED
from engine.config import recipe as recipes
from engine.metrics.read import read_evaluation_lines
from engine.runs.experiments import RESULTS
from engine.runs.run import open_run

from .base import PROGRAMS, RECIPE, Base
from .cases import Case, Tried, try_cases
from .checks import outcome_of, problems_of_end, problems_of_files, problems_of_run
from .children import Child, Ended, call, command
from .fuzz_commands import corrupt_file

_SETTINGS: list[tuple[str, ...]] = [
    *((), (), ("lr=1e-3",), ("seed=1",), ("batch_size=4",), ("balance=sum",), ("dropout=0",)),
    *(("train=['sst']",), ("task_schedule=cycle",), ("epochs=2",)),
]
_DIVERGING = ("lr=1e18", "warmup=0", "schedule=constant")
_SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
_COMMANDS = 6
"""At most, in a case."""
_LONG = 400
"""Steps of a run that is stopped by a signal: more than it gets to."""


def try_sequences(
    base: Base, folder: Path, count: int, seed: int, only: int | None
) -> dict[str, Any]:
    """Try ``count`` sequences: :func:`.try_cases`."""
    return try_cases("sequences", folder, functools.partial(_attempt, base), count, seed, only)


def _attempt(base: Base, case: Case) -> Tried:
    folders = _Folders(base, case.folder, case.draw)
    problems = list[str]()
    for _ in range(case.draw.randint(2, _COMMANDS)):
        action = case.draw.choices(list(_ACTIONS), list(_ACTIONS.values()))[0]
        problems = list(action(folders))
        if problems:
            break
    return Tried("; ".join(folders.done), folders.last, problems)


class _Folders:
    """The folders of a case, and what is known of them.

    Attributes:
        made: the settings that each run was made with.
        unsure: runs that may be refused: corrupted or not finite.
        stopped: runs that may have no checkpoint.
        corrupted: whether any file was.
        done: the commands so far, as a person would write them.
        last: how the last one ended.
    """

    def __init__(self, base: Base, folder: Path, draw: random.Random) -> None:
        self.base, self.folder, self.draw = base, folder, draw
        self.made: dict[str, tuple[str, ...]] = {}
        self.unsure: set[str] = set()
        self.stopped: set[str] = set()
        self.corrupted = False
        self.done: list[str] = []
        self.last = "none"
        self._names = (f"new-{number}" for number in itertools.count())

    def run(self) -> str:
        return self.draw.choice(["a", "a", "b"])

    def new(self) -> Path:
        return self.folder / next(self._names)

    def call(self, what: str, program: str, arguments: list[str]) -> Ended:
        self.done.append(what)
        ended = call(command(PROGRAMS[program], arguments), self.folder)
        self.last = outcome_of(ended)
        return ended

    def settings(self) -> tuple[str, ...]:
        return _DIVERGING if self.draw.random() < 0.1 else self.draw.choice(_SETTINGS)

    def general_problems(self, ended: Ended) -> Iterator[str]:
        yield from problems_of_end(ended)
        if not self.corrupted:
            yield from problems_of_files(self.folder)


def _train(folders: _Folders, *, resume: bool = False) -> Iterator[str]:
    """Train or resume, half of the time with the settings that the run was made with."""
    name, settings = folders.run(), folders.settings()
    if resume and name in folders.made and folders.draw.random() < 0.5:
        settings = folders.made[name]
    steps = folders.draw.choice([1, 2, 3])
    run = folders.folder / name
    exists, is_run = run.exists(), (run / "recipe.toml").exists()
    fits = name in folders.unsure or not is_run or _can_end_at(run, steps)
    options = ["--resume"] if resume else []
    arguments = [*folders.base.training(run, *settings, steps=steps), *options]
    what = " ".join(["train", name, f"{steps} steps", *settings, *options])
    ended = folders.call(what, "train", arguments)
    yield from folders.general_problems(ended)
    usual = name not in folders.unsure and settings != _DIVERGING
    if not resume and is_run and ended.status == 0:
        yield "a run that was there was written over"
    if resume and ended.status == 0 and not fits:
        yield f"was called a run of {steps} steps"
    if ended.status == 0:
        folders.made[name] = settings
        folders.stopped.discard(name)
        yield from _holds(folders, run, settings)
        if name not in folders.unsure:
            yield from problems_of_run(run)
    elif usual and fits and (not exists or (resume and folders.made.get(name) == settings)):
        yield f"expected to be done, {ended.error[-200:]}"
    if settings == _DIVERGING:
        folders.unsure.add(name)


def _can_end_at(run: Path, steps: int) -> bool:
    """Return whether a run has trained fewer steps, or was scored after so many."""
    trained = open_run(run).checkpoints.progress().step
    scored = [line["step"] for line in read_evaluation_lines(run)] if trained else []
    return trained < steps or steps in scored[-1:]


def _resume(folders: _Folders) -> Iterator[str]:
    yield from _train(folders, resume=True)


def _holds(folders: _Folders, run: Path, settings: tuple[str, ...]) -> Iterator[str]:
    """Hold the recipe in a run's folder against the settings that it was just trained under."""
    now = recipes.load(RECIPE, [f"data={json.dumps(str(folders.base.data))}", *settings])
    made = recipes.load(str(run / "recipe.toml"))
    for setting in settings:
        field = setting.partition("=")[0]
        if getattr(now, field) != getattr(made, field):
            yield f"done, but {run.name} was made with {field} = {getattr(made, field)!r}"


def _stop(folders: _Folders) -> Iterator[str]:
    """Send a signal to a run at some moment, then see whether it is known for what it is."""
    name, number = folders.run(), folders.draw.choice(_SIGNALS)
    run = folders.folder / name
    arguments = folders.base.training(run, "log_every=1", steps=_LONG)
    logged = _logged(run)
    child = Child(command(PROGRAMS["train"], [*arguments, "--resume"]), folders.folder)
    time.sleep(folders.draw.uniform(0, 0.6))
    child.kill(number)
    ended = child.wait()
    folders.done.append(f"train {name} {_LONG} steps --resume, {number.name}")
    folders.last = outcome_of(ended)
    if (run / "recipe.toml").exists():
        folders.made.setdefault(name, ())
    folders.stopped.add(name)
    killed = ended.status in (-number, STOPPED + number)
    # A hangup ends what has not come to its first step.
    expected = killed and (number != signal.SIGHUP or _logged(run) == logged)
    if not expected:
        yield from problems_of_end(ended)


def _logged(run: Path) -> int | None:
    """Return the bytes of a run's log of steps; None where it has none."""
    log = run / "metrics.jsonl"
    return log.stat().st_size if log.exists() else None


def _series(folders: _Folders) -> Iterator[str]:
    """Train a series, as seeds or as a sweep, in a folder that may hold one."""
    settings = folders.draw.choice([s for s in _SETTINGS if not s or s[0] != "seed=1"])
    out, count = folders.folder / "series", folders.draw.choice(["1", "2"])
    program = folders.draw.choice(["train", "sweep"])
    arguments = [*folders.base.training(out, *settings), "--seeds", count]
    ended = folders.call(" ".join([program, "--seeds", count, *settings]), program, arguments)
    yield from folders.general_problems(ended)
    if ended.status == 0:
        results = json.loads((out / RESULTS).read_text())
        group = "" if program == "train" else f"{RECIPE}/"
        for seed in range(int(count)):
            cell = f"{group}seed-{seed}"
            if cell not in results:
                yield f"done, but {RESULTS} has no {cell}"
            else:
                yield from _holds(folders, out / cell, settings)


def _two_recipes(folders: _Folders) -> Iterator[str]:
    """Sweep two recipe files of one name: both are trained."""
    files = [folders.new() / "x.toml" for _ in range(2)]
    for number, file in enumerate(files):
        file.parent.mkdir()
        text = recipes.load(RECIPE, [f"description=number {number}"]).to_toml()
        file.write_text(text)
    out = folders.new()
    _, *options = folders.base.training(out, steps=1)
    ended = folders.call("sweep a/x.toml b/x.toml", "sweep", [*map(str, files), *options])
    yield from problems_of_end(ended)
    if ended.status == 0 and len(list(out.rglob("recipe.toml"))) < len(files):
        yield "done, but a recipe was not trained"


def _use(folders: _Folders) -> Iterator[str]:
    """Evaluate, predict, export or report a run."""
    name = folders.run()
    run, new = folders.folder / name, folders.new()
    predict = ["--task", "sst", "--input", str(folders.base.rows), "--output", str(new)]
    given = {
        "evaluate": ["--split", folders.draw.choice(["dev", "train"])],
        "predict": predict,
        "export": ["--to", str(new)],
        "report": [*folders.draw.choice([[], ["--papers"]]), "--out", str(new)],
    }
    program = folders.draw.choice(list(given))
    ended = folders.call(f"{program} {name}", program, [str(run), *given[program]])
    yield from folders.general_problems(ended)
    is_done = name in folders.made and name not in folders.unsure | folders.stopped
    # Scores on the training data are not what the papers' tables hold.
    if ended.status == BAD_INPUT and is_done and "--papers" not in given[program]:
        yield f"of a run that is done: {ended.error[-200:]}"
    if ended.status == 0 and program in ("predict", "export") and not new.exists():
        yield f"done, but there is no {new.name}"


def _report_two(folders: _Folders) -> Iterator[str]:
    """Report two runs of one name: a page for each."""
    runs = [folders.base.copy_run(folders.new() / "run") for _ in range(2)]
    out = folders.new()
    ended = folders.call("report x/run y/run", "report", [*map(str, runs), "--out", str(out)])
    yield from problems_of_end(ended)
    if ended.status == 0 and len(list(out.glob("*.html"))) < len(runs):
        yield "done, but two runs have one page"


def _corrupt(folders: _Folders) -> Iterator[str]:
    """Corrupt a file of a run or a series; whatever comes, it comes in one line."""
    files = sorted(path for path in folders.folder.rglob("*") if path.is_file())
    files = [path for path in files if path.parent != folders.folder]
    if files:
        path = folders.draw.choice(files)
        corrupt_file(path, folders.draw)
        relative = path.relative_to(folders.folder)
        folders.done.append(f"corrupt {relative}")
        folders.unsure.add(relative.parts[0])
        folders.corrupted = True
    yield from ()


def _copy_within(folders: _Folders) -> Iterator[str]:
    """Put a run in place of another by hand."""
    a, b = folders.folder / "a", folders.folder / "b"
    if a.is_dir() and not b.exists() and "a" not in folders.unsure | folders.stopped:
        shutil.copytree(a, b)
        folders.done.append("cp -r a b")
        if "a" in folders.made:
            folders.made["b"] = folders.made["a"]
            open_run(b)
    yield from ()


_ACTIONS: dict[Callable[[_Folders], Iterator[str]], int] = {
    _train: 3,
    _resume: 4,
    _stop: 2,
    _series: 3,
    _two_recipes: 1,
    _use: 4,
    _report_two: 1,
    _corrupt: 2,
    _copy_within: 1,
}
