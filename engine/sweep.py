"""``python -m engine.sweep RECIPE …``: recipes, points of a grid and seeds, one after the other."""

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
from .cli.series import train_series
from .cli.standard_output import train_without_output
from .config import recipe as recipes
from .config.renamed import with_new_name
from .runs.experiments import (
    MOST_RUNS,
    RunSpec,
    check_models,
    seeds_of,
)
from .runs.lock import held
from .runtime.precision import pick_device
from .train import train_run
from .utils.errors import InputError
from .utils.file_names import as_file_name, distinct_names
from .utils.files import explained, resolved

_ENDING = ".toml"


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
    settings, specs, renamed = overrides(options), list[RunSpec](), list[str]()
    for group, name in groups(names).items():
        for point in grid_points(options.grid):
            recipe, lines = recipes.read(name, [*settings, *point])
            specs += seeds_of(_group_of(group, point), recipe, options.seeds)
            renamed += lines
    print_warnings(renamed)
    out = resolved(options.out)
    check_models(out, specs)
    with held(out), _time_limit(options.minutes) as over:
        return train_series(out, specs, lambda run: train_run(run, device, console), console, over)


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
    add("--seeds", type=positive, default=1, metavar="N", help="repetitions of each (default: 1)")
    add(
        "--minutes",
        type=float,
        metavar="M",
        help="stop with a checkpoint after so long (default: when all is trained)",
    )
    add_settings(what)
    where.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder of the runs; needed"
    )
    add_device(where)
    return parser


if __name__ == "__main__":
    run_cli(main)
