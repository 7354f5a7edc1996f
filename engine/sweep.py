"""``python -m engine.sweep RECIPE …``: recipes, points of a grid or at random, and seeds.

They are trained one after the other, all to their end, or by successive halving.
"""

import argparse
import itertools
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from types import FrameType

from .cli.common import Parser, positive, print_warnings, run_cli, terminal
from .cli.options import add_device, add_settings, overrides
from .cli.series import halve_series, train_series
from .cli.standard_output import train_without_output
from .config import recipe as recipes
from .config.renamed import with_new_name
from .runs.draws import random_points
from .runs.experiments import (
    MOST_RUNS,
    RunSpec,
    check_models,
    seeds_of,
)
from .runs.halving import plan_halving, score_newest
from .runs.lock import held
from .runs.ranking import check_baseline
from .runs.run import Run
from .runtime.precision import pick_device
from .train import train_run
from .utils.errors import InputError
from .utils.file_names import as_file_name, distinct_names
from .utils.files import explained, resolved

_ENDING = ".toml"

_ETA = 3
"""That of Hyperband's experiments (Li et al. 2018)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = _parser().parse_args(arguments)
    train_without_output()
    console, device = terminal(), pick_device(options.device)
    names = [*options.recipes, *(recipes.of_papers() if options.papers else ())]
    if not names:
        raise InputError("RECIPE is missing; name some, or give --papers")
    if options.minutes is not None and not 0 <= options.minutes <= threading.TIMEOUT_MAX / 60:
        raise InputError(f"--minutes {options.minutes}: expected a number of minutes, at least 0")
    _check_options(options)
    settings, specs, renamed = overrides(options), list[RunSpec](), list[str]()
    points = _points(options)
    for group, name in groups(names).items():
        for point in points:
            recipe, lines = recipes.read(name, [*settings, *point])
            specs += seeds_of(_group_of(group, point), recipe, options.seeds, point)
            renamed += lines
    print_warnings(renamed)
    plan = plan_halving(specs, options.min_steps, options.eta or _ETA) if options.halving else None
    if options.compare_to is not None:
        check_baseline(options.compare_to, specs)
    out = resolved(options.out)
    check_models(out, specs)

    def train(run: Run, stop_after: int | None = None) -> signal.Signals | None:
        return train_run(run, device, console, stop_after=stop_after)

    with held(out), _time_limit(options.minutes) as over:
        if plan is None:
            return train_series(out, specs, train, console, over, options.compare_to)
        return halve_series(out, plan, train, lambda run: score_newest(run, device), console, over)


def _check_options(options: argparse.Namespace) -> None:
    """Check that options which need each other are given together.

    Raises:
        InputError: one is missing.
    """
    if options.random is not None and not options.draw:
        raise InputError("--random: name what is drawn, such as --draw lr=log:1e-5:1e-3")
    if options.draw and options.random is None:
        raise InputError("--draw: give the number of draws by --random N")
    if options.compare_to is not None and options.halving:
        raise InputError("--compare-to: has no effect with --halving, whose table has ranks")
    if options.halving and options.min_steps is None:
        raise InputError("--halving: give the steps of the first rung by --min-steps N")
    for name in ("min_steps", "eta"):
        if getattr(options, name) is not None and not options.halving:
            raise InputError(f"--{name.replace('_', '-')}: has no effect without --halving")


def _points(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the points of the grid, each with every random draw, as overrides.

    Raises:
        InputError: an axis or a draw is not right, or there are too many points.
    """
    points = grid_points(options.grid)
    if options.random is None:
        return points
    count = len(points) * options.random
    if count > MOST_RUNS:
        raise InputError(f"--random {options.random}: {count} points; give at most {MOST_RUNS}")
    fields = [with_new_name(setting.partition("=")[0])[0] for setting in points[0]]
    draws = random_points(options.draw, options.random, options.seed or 0, fields)
    return [(*point, *draw) for point in points for draw in draws]


def grid_points(axes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the points of a grid as overrides.

    Args:
        axes: ``key=value,value,…`` each.

    Raises:
        InputError: an axis names no values, two name one field, or there are too many points.
    """
    choices, fields = [], set[str]()
    for axis in axes:
        key, separator, values = axis.partition("=")
        if not separator or not all(value.strip() for value in values.split(",")):
            raise InputError(f"--grid {axis}: expected key=value,value,…")
        field, _, _ = with_new_name(key.strip())
        if field in fields:
            raise InputError(f"--grid {axis}: {field} is given already; name each field once")
        fields.add(field)
        choices.append([f"{key.strip()}={value.strip()}" for value in values.split(",")])
    count = math.prod(map(len, choices))
    if count > MOST_RUNS:
        raise InputError(f"--grid: {count} points; give at most {MOST_RUNS}")
    return list(itertools.product(*choices))


def groups(names: Sequence[str]) -> dict[str, str]:
    """Return recipes by the folders that their runs go into, each recipe once.

    A file's is its name without the ending, with folders before it where that tells two apart.
    """
    with explained("look from", Path()):
        return _groups(names)


def _groups(names: Sequence[str]) -> dict[str, str]:
    once = {os.path.realpath(name) if _is_file(name) else name: name for name in reversed(names)}
    asked = list(reversed(once.values()))
    # Not `with_suffix`: of "..toml" Python 3.12 leaves the name of the folder.
    paths = [PurePath(os.path.abspath(name) if _is_file(name) else name) for name in asked]
    found = map(as_file_name, distinct_names(paths, ending=_ENDING))
    return dict(zip(found, asked, strict=True))


def _is_file(name: str) -> bool:
    return name.endswith(_ENDING)


def _group_of(group: str, point: tuple[str, ...]) -> str:
    """Return the folder of a recipe's runs at a point of the grid."""
    return f"{group}/{as_file_name(','.join(point))}" if point else group


@contextmanager
def _time_limit(minutes: float | None) -> Iterator[threading.Event]:
    """Within the block, ask this process to stop (SIGTERM) once the time is over.

    It is asked again every second, since only a training loop heeds it; the event that the block
    gets is set from then on.
    """
    over, left = threading.Event(), threading.Event()
    if minutes is None:
        yield over
        return

    def ask() -> None:
        left.wait(60 * minutes)
        over.set()
        while not left.wait(1.0):
            os.kill(os.getpid(), signal.SIGTERM)

    def ignore(_number: int, _frame: FrameType | None) -> None:
        if not over.is_set():
            raise KeyboardInterrupt

    usual = signal.signal(signal.SIGTERM, ignore)
    timer = threading.Thread(target=ask, name="time limit", daemon=True)
    timer.start()
    try:
        yield over
    finally:
        left.set()
        timer.join()
        signal.signal(signal.SIGTERM, usual)


def _from_two(text: str) -> int:
    """Return the whole number from 2 on that an option was given.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.strip().isdecimal() and int(text) > 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 2 on")
    return int(text)


def _parser() -> Parser:
    parser = Parser(
        prog=f"python -m {__package__}.sweep",
        description="Train several runs below one folder; rerun to resume.",
    )
    what, where = parser.add_argument_group("what to train"), parser.add_argument_group("where")
    add = what.add_argument
    add("recipes", nargs="*", metavar="RECIPE", help="built-in recipes' names or TOML files")
    add("--papers", action="store_true", help="all recipes that stand for a system of a paper")
    add(
        "--grid",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,…",
        help="train every combination, such as lr=1e-3,1e-4 batch_size=8,16 epochs=3,6 "
        "(default: the recipe alone)",
    )
    add(
        "--random",
        type=positive,
        metavar="N",
        help="train N random draws of the settings that --draw names (default: none)",
    )
    add(
        "--draw",
        nargs="+",
        default=[],
        metavar="KEY=KIND:…",
        help="distributions of the draws: KEY=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH or "
        "choice:VALUE,VALUE,… (default: none)",
    )
    add(
        "--seed",
        type=int,
        metavar="N",
        help="decides the draws and, as in train, weights, batches, dropout (default: 0)",
    )
    add("--seeds", type=positive, default=1, metavar="N", help="repetitions of each (default: 1)")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="stop with a checkpoint after so long (default: when all is trained)",
    )
    add(
        "--compare-to",
        metavar="KEY=VALUE,…",
        help="give the table a column of paired differences, seed by seed, from the group with "
        "these settings, such as balance=sum (default: no such column)",
    )
    add_settings(what)
    halving = parser.add_argument_group("successive halving")
    halving.add_argument(
        "--halving",
        action="store_true",
        help="train all for --min-steps, the best 1/eta by dev score for eta times as many, and "
        "so on up to max_steps (default: all to their end)",
    )
    halving.add_argument(
        "--min-steps",
        type=positive,
        metavar="N",
        help="steps that every run is trained for (default: none; --halving needs it)",
    )
    halving.add_argument(
        "--eta",
        type=_from_two,
        metavar="N",
        help=f"how many times as many steps the next rung has, and fewer runs (default: {_ETA})",
    )
    where.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder of the runs; needed"
    )
    add_device(where)
    return parser


if __name__ == "__main__":
    run_cli(main)
