"""Train several runs below one folder and report their ends: ``train --seeds`` and ``sweep``."""

import math
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ..runs.experiments import RunSpec, check_results, print_failed, read_results
from ..runs.halving import Plan, read_record, rungs, train_halving
from ..runs.halving_table import print_rungs
from ..runs.job import Outcome, Workers
from ..runs.ranking import print_results, without_keys
from ..runs.schedule import AllRuns, Ending, train_runs
from ..runs.tuning import Tuning, check_record
from .common import DIED, DIVERGED, STOPPED
from .parser import BAD_INPUT


def train_series(
    folder: Path,
    specs: Sequence[RunSpec],
    workers: Workers,
    console: Console,
    deadline: float = math.inf,
    *,
    pruned: bool = False,
    compare_to: str | None = None,
) -> int:
    """Train the runs that are not done yet, and print the scores of all in the folder.

    Args:
        folder: of the series, held by this process.
        specs: its runs, in the order in which they are trained.
        workers: that train them.
        console: for progress and scores.
        deadline: by the monotonic clock; no run is begun from then on.
        pruned: whether finished runs lose their checkpoints.
        compare_to: settings of the group that the others are compared with; None for none.

    Returns:
        The command's exit status: that of a diverged run if one diverged, else that of a defect if
        one died twice, else that of bad input if one does not fit in memory or got bad input.

    Raises:
        InputError: the folder has scores of other settings, or the first run got bad input.
    """
    check_results(folder, specs)
    ending = train_runs(folder, AllRuns(specs), workers, console, deadline, pruned=pruned)
    print_results(console, folder, read_results(folder), specs, compare_to=compare_to)
    _print_ends(console, workers, ending)
    return _status(ending) if ending.done else _stopped(console, ending)


def tune_series(
    folder: Path,
    tuning: Tuning,
    workers: Workers,
    console: Console,
    deadline: float = math.inf,
    *,
    pruned: bool = False,
    compare_to: str | None = None,
) -> int:
    """Train the candidates of every point, further seeds of the best, and print those.

    Args:
        folder: as of :func:`train_series`, and so are the others.
        tuning: the points.
        workers: that train the runs.
        console: for progress and scores.
        deadline: no run is begun from then on.
        pruned: whether finished runs lose their checkpoints.
        compare_to: settings of the group that the others are compared with; None for none.

    Returns:
        The exit status, as of :func:`train_series`, but that a candidate may diverge, or not fit in
        memory, where its point has another one.

    Raises:
        InputError: as of :func:`train_series`, or ``tuned.json`` is damaged.
    """
    check_results(folder, tuning.specs)
    check_record(folder)  # before hours of training
    ending = train_runs(folder, tuning, workers, console, deadline, pruned=pruned)
    results = read_results(folder)
    tuning.write(folder, results, ending.failed)
    others = tuning.others(results, ending.failed)
    shown = {name: result for name, result in results.items() if result.group not in others}
    specs = [spec for spec in tuning.specs if spec.group not in others]
    families = {spec.group: without_keys(spec.point, tuning.keys) for spec in specs}
    print_results(console, folder, shown, specs, compare_to=compare_to, families=families)
    tuning.print(console, results, ending.failed)
    _print_ends(console, workers, ending)
    return _status(ending) if ending.done else _stopped(console, ending)


def halve_series(
    folder: Path,
    plan: Plan,
    workers: Workers,
    console: Console,
    deadline: float = math.inf,
    *,
    pruned: bool = False,
) -> int:
    """Train candidates by successive halving, as far as is not done yet, and print their ranks.

    Args:
        folder: of the series, held by this process.
        plan: its candidates and rungs.
        workers: that train the runs.
        console: for progress and ranks.
        deadline: by the monotonic clock; no run is begun from then on.
        pruned: whether finished runs lose their checkpoints.

    Returns:
        The command's exit status; 0 if a candidate was trained to its end, whether or not others
        diverged, unless one died twice.

    Raises:
        InputError: the folder has runs of other settings, or of another plan.
    """
    check_results(folder, plan.specs)
    ending = train_halving(folder, plan, workers, console, deadline, pruned=pruned)
    results = read_results(folder)
    found = rungs(plan, read_record(folder, plan), results)
    print_rungs(console, plan, found)
    _print_ends(console, workers, ending)
    if not ending.done:
        return _stopped(console, ending)
    if Outcome.DIED in ending.outcomes:
        return DIED
    return 0 if any(spec.name in results for spec in plan.specs) else DIVERGED


def _print_ends(console: Console, workers: Workers, ending: Ending) -> None:
    _print_tried_again(console, workers.tried_again)
    print_failed(console, ending.failed)


def _print_tried_again(console: Console, reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        console.print(f"tried again: {name} ({reason})", soft_wrap=True, highlight=False)


def _status(ending: Ending) -> int:
    if Outcome.DIVERGED in ending.outcomes:
        return DIVERGED
    if Outcome.DIED in ending.outcomes:
        return DIED
    return BAD_INPUT if ending.outcomes else 0


def _stopped(console: Console, ending: Ending) -> int:
    why = "the time is over" if ending.signal is None else f"stopped by {ending.signal.name}"
    console.print(f"{why}; the same command goes on with the runs that are not done")
    return STOPPED + (ending.signal or signal.SIGTERM)
