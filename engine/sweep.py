"""``python -m engine.sweep RECIPE …``: recipes, points of a grid or at random, and seeds.

They are trained in processes of their own, all to their end, or by successive halving; of some
settings each point may keep the best value alone.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path, PurePath
from signal import Signals

import torch
from rich.console import Console

from .cli.children import Children
from .cli.common import Parser, positive, print_warnings, run_cli, terminal
from .cli.data_progress import add_reading, reading_of, shown_on
from .cli.options import add_device, add_settings, overrides
from .cli.series import halve_series, train_series, tune_series
from .cli.standard_output import train_without_output
from .config import recipe as recipes
from .config.renamed import with_new_name
from .data.cache import Reading, unwatched
from .runs.draws import random_points, split_values
from .runs.experiments import (
    MOST_RUNS,
    RunSpec,
    check_models,
    seeds_of,
)
from .runs.halving import plan_halving, score_newest
from .runs.job import End, Job, Workers, train_job
from .runs.lock import held
from .runs.ranking import check_baseline
from .runs.run import Run
from .runs.tuning import Point, Tuning
from .runtime.cpu import share_cores
from .runtime.precision import pick_device
from .train import train_run
from .training.build import check_balance
from .utils.cpus import usable_cpus
from .utils.errors import InputError
from .utils.file_names import as_file_name, distinct_names
from .utils.files import explained, resolved

_ENDING = ".toml"

_ETA = 3
"""That of Hyperband's experiments (Li et al. 2018)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = parser().parse_args(arguments)
    train_without_output()
    console, device = terminal(), pick_device(options.device)
    names = [*options.recipes, *(recipes.of_papers() if options.papers else ())]
    if not names:
        raise InputError("RECIPE is missing; name some, or give --papers")
    if options.minutes is not None and not 0 <= options.minutes < math.inf:
        raise InputError(f"--minutes {options.minutes}: expected a number of minutes, at least 0")
    _check_options(options)
    points, renamed = _points(names, options)
    print_warnings(renamed)
    specs = [spec for point in points for runs in point.candidates.values() for spec in runs]
    plan = plan_halving(specs, options.min_steps, options.eta or _ETA) if options.halving else None
    tuning = Tuning(points) if options.tune else None
    if options.compare_to is not None:
        check_baseline(options.compare_to, specs, () if tuning is None else tuning.keys)
    out = resolved(options.out)
    check_models(out, specs)
    for spec in specs:
        check_balance(spec.recipe)
    workers = workers_of(device, console, options.jobs, reading_of(options, console))
    minutes = math.inf if options.minutes is None else options.minutes
    deadline, pruned = time.monotonic() + 60 * minutes, options.prune
    with held(out):
        if plan is not None:
            return halve_series(out, plan, workers, console, deadline, pruned=pruned)
        if tuning is not None:
            return tune_series(
                out,
                tuning,
                workers,
                console,
                deadline,
                pruned=pruned,
                compare_to=options.compare_to,
            )
        return train_series(
            out, specs, workers, console, deadline, pruned=pruned, compare_to=options.compare_to
        )


def workers_of(device: torch.device, console: Console, jobs: int, reading: Reading) -> Workers:
    """Return the processes that train the runs."""
    # Another process shows progress on a console of its own.
    plain = reading._replace(watch=unwatched)
    train = partial(train_one, device=device, jobs=jobs, reading=plain)
    return Children(train, console, jobs)


def train_one(job: Job, device: torch.device, jobs: int, reading: Reading) -> End:
    """Train one run in this process, which shares the machine with others of ``jobs`` in all."""
    share_cores(jobs)
    if not reading.workers:
        reading = reading._replace(workers=max(1, usable_cpus() // jobs))

    def train(run: Run, steps: int | None) -> Signals | None:
        return train_run(run, device, terminal(), stop_after=steps)

    reading = shown_on(terminal(), reading)
    return train_job(job, train, lambda run: score_newest(run, device), reading)


def _check_options(options: argparse.Namespace) -> None:
    """Check that options which need each other are given together.

    Raises:
        InputError: one is missing, or two exclude each other.
    """
    if options.random is not None and not options.draw:
        raise InputError("--random: name what is drawn, such as --draw lr=log:1e-5:1e-3")
    if options.draw and options.random is None:
        raise InputError("--draw: give the number of draws by --random N")
    if options.compare_to is not None and options.halving:
        raise InputError("--compare-to: has no effect with --halving, whose table has ranks")
    if options.halving and options.min_steps is None:
        raise InputError("--halving: give the steps of the first rung by --min-steps N")
    if options.halving and options.tune:
        raise InputError(
            "--tune: --halving keeps the best of all candidates, not the best of each point; give "
            "the keys to --grid, or leave --halving out"
        )
    for name in ("min_steps", "eta"):
        if getattr(options, name) is not None and not options.halving:
            raise InputError(f"--{name.replace('_', '-')}: has no effect without --halving")


def _points(names: Sequence[str], options: argparse.Namespace) -> tuple[list[Point], list[str]]:
    """Return the points of all recipes with their candidates, and warnings about old names.

    A point has one candidate where nothing is tuned.

    Raises:
        InputError: a recipe, an axis or a draw is not right, or there are too many points.
    """
    settings, found, renamed = overrides(options), list[Point](), list[str]()
    points = _grid_and_draws(options)
    tuned = grid_points(options.tune, "--tune", _fields(points[0]))
    keys = tuple(setting.partition("=")[0] for setting in tuned[0])
    _check_given_once(options, (*points[0], *tuned[0]))
    _check_count("--tune", len(points) * len(tuned))
    for group, name in groups(names).items():
        for point in points:
            candidates = dict[str, list[RunSpec]]()
            for values in tuned:
                own = (*point, *values)
                recipe, lines = recipes.read(name, [*settings, *own])
                place = _group_of(group, own)
                candidates[place] = seeds_of(place, recipe, options.seeds, own)
                renamed += lines
            found.append(Point(_group_of(group, point), keys, candidates))
    return found, renamed


def _grid_and_draws(options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Return the points of the grid, each with every random draw, as overrides.

    Raises:
        InputError: an axis or a draw is not right, or there are too many points.
    """
    points = grid_points(options.grid)
    if options.random is None:
        return points
    _check_count(f"--random {options.random}", len(points) * options.random)
    fields = _fields(points[0])
    draws = random_points(options.draw, options.random, options.seed or 0, fields)
    return [(*point, *draw) for point in points for draw in draws]


def grid_points(
    axes: Sequence[str], option: str = "--grid", taken: Collection[str] = ()
) -> list[tuple[str, ...]]:
    """Return the points of a grid as overrides.

    Args:
        axes: ``key=value,value,…`` each; commas within a list, a table or quotes of TOML belong to
            the value.
        option: what they were given to, ``--grid`` or ``--tune``.
        taken: fields that have their values otherwise.

    Raises:
        InputError: an axis names no values, or one alone to choose from, two name one field, or
            there are too many points.
    """
    choices, fields = [], set(taken)
    for axis in axes:
        key, values = _axis(axis, option)
        field, _, _ = with_new_name(key)
        if field in fields:
            raise InputError(f"{option} {axis}: {field} is given already; name each field once")
        if option == "--tune" and len(set(values)) < 2:
            raise InputError(
                f"--tune {axis}: one value is no choice; give several, or this one by --set"
            )
        fields.add(field)
        choices.append([f"{key}={value}" for value in values])
    _check_count(option, math.prod(map(len, choices)))
    return list(itertools.product(*choices))


def _axis(text: str, option: str) -> tuple[str, list[str]]:
    """Return the key and the values of an axis.

    Raises:
        InputError: it has none.
    """
    key, separator, values = text.partition("=")
    try:
        if separator:
            return key.strip(), split_values(values)
    except ValueError:
        pass
    raise InputError(f"{option} {text}: expected key=value,value,…")


def _fields(point: Iterable[str]) -> list[str]:
    """Return the fields that a point gives, under their names now."""
    return [with_new_name(setting.partition("=")[0])[0] for setting in point]


def _check_given_once(options: argparse.Namespace, point: Iterable[str]) -> None:
    """Check that no setting of all runs is replaced at every point.

    Raises:
        InputError: one is.
    """
    fields = _fields(point)
    for setting in itertools.chain.from_iterable(options.set):
        (field,) = _fields([setting])
        if field in fields:
            raise InputError(
                f"--set {setting}: --grid, --tune or --draw gives values of {field}; name each "
                "field once"
            )


def _check_count(option: str, count: int) -> None:
    """Check that a series is not too long to be planned.

    Raises:
        InputError: it is.
    """
    if count > MOST_RUNS:
        raise InputError(f"{option}: {count} points; give at most {MOST_RUNS}")


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


def _from_two(text: str) -> int:
    """Return the whole number from 2 on that an option was given.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.strip().isdecimal() and int(text) > 1):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 2 on")
    return int(text)


def parser() -> Parser:
    """Return the command's parser."""
    made = Parser(
        prog=f"python -m {__package__}.sweep",
        description="Train several runs below one folder; rerun to resume.",
    )
    what, where = made.add_argument_group("what to train"), made.add_argument_group("where")
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
        "--tune",
        nargs="+",
        default=[],
        metavar="KEY=VALUE,…",
        help="of these values keep at each point the best by dev score: the first seed trains "
        "all, the others that one alone (default: nothing is tuned)",
    )
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
    halving = made.add_argument_group("successive halving")
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
    where.add_argument(
        "--jobs",
        type=positive,
        default=1,
        metavar="N",
        help="train N runs at once, which share the CPU's cores, or the GPU (default: 1)",
    )
    add_reading(where)
    where.add_argument(
        "--prune",
        action="store_true",
        help="remove the checkpoints of each run that is done; its recipe, tokenizer, metrics and "
        "scores stay, and unfinished runs keep all (default: keep the checkpoints)",
    )
    return made


if __name__ == "__main__":
    run_cli(main)
