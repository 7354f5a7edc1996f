"""Train several runs below one folder and report their ends: ``train --seeds`` and ``sweep``."""

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import Signals

from rich.console import Console

from ..runs.experiments import (
    Ending,
    RunSpec,
    check_results,
    print_failed,
    read_results,
    train_runs,
)
from ..runs.halving import Plan, is_done, read_record, rungs, train_halving
from ..runs.halving_table import print_rungs
from ..runs.ranking import print_results
from ..runs.run import Run
from .common import BAD_INPUT, DIVERGED, STOPPED


def train_series(
    folder: Path,
    specs: Sequence[RunSpec],
    train_run: Callable[[Run], Signals | None],
    console: Console,
    over: threading.Event | None = None,
    compare_to: str | None = None,
) -> int:
    """Train the runs that are not done yet, and print the scores of all in the folder.

    Args:
        folder: of the series, held by this process.
        specs: its runs, in the order in which they are trained.
        train_run: trains a run to its end, or until a signal, which it returns.
        console: for progress and scores.
        over: no run is begun once it is set.
        compare_to: settings of the group that the others are compared with; None for none.

    Returns:
        The command's exit status: that of a diverged run if one diverged, else that of bad input if
        one does not fit in memory.

    Raises:
        InputError: the folder has scores of other settings.
    """
    check_results(folder, specs)
    ending = train_runs(folder, specs, train_run, console, over)
    results = read_results(folder)
    print_results(console, folder, results, specs, compare_to=compare_to)
    print_failed(console, ending.failed)
    if all(spec.name in {**results, **ending.failed} for spec in specs):
        without_memory = BAD_INPUT if ending.failed else 0
        return DIVERGED if ending.diverged else without_memory
    return _stopped(console, ending)


def halve_series(
    folder: Path,
    plan: Plan,
    train_run: Callable[[Run, int | None], Signals | None],
    score_run: Callable[[Run], Mapping[str, float]],
    console: Console,
    over: threading.Event | None = None,
) -> int:
    """Train candidates by successive halving, as far as is not done yet, and print their ranks.

    Args:
        folder: of the series, held by this process.
        plan: its candidates and rungs.
        train_run: trains a run up to so many steps (None: to its end), or until a signal, which it
            returns.
        score_run: returns the dev scores of a run's newest checkpoint.
        console: for progress and ranks.
        over: no run is begun once it is set.

    Returns:
        The command's exit status; 0 if a candidate was trained to its end, whether or not others
        diverged.

    Raises:
        InputError: the folder has runs of other settings, or of another plan.
    """
    check_results(folder, plan.specs)
    ending = train_halving(folder, plan, train_run, score_run, console, over)
    results = read_results(folder)
    found = rungs(plan, read_record(folder, plan), results)
    print_rungs(console, plan, found)
    print_failed(console, ending.failed)
    if is_done(plan, found):
        return 0 if any(spec.name in results for spec in plan.specs) else DIVERGED
    return _stopped(console, ending)


def _stopped(console: Console, ending: Ending) -> int:
    why = "the time is over" if ending.signal is None else f"stopped by {ending.signal.name}"
    console.print(f"{why}; the same command goes on with the runs that are not done")
    return STOPPED + (ending.signal or signal.SIGTERM)
