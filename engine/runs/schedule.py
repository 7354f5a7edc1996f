"""Order of the runs of a series, and what is kept of their ends: ``results.json``."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import NamedTuple, Protocol

from rich.console import Console

from ..utils.errors import InputError
from ..utils.files import remove_partial_files
from .experiments import RESULTS, Result, RunSpec, TimeLeft, read_results, write_results
from .job import End, Job, Outcome, Workers
from .prune import prune
from .scoring import Criterion

WAIT = 30.0
"""Seconds in which a run that a killed series left writes its last checkpoint."""


class Ending(NamedTuple):
    """End of a series.

    Attributes:
        signal: that stopped it, or None.
        failed: why runs of it have no result, by their names.
        outcomes: how those ended that leave a hole in the results.
        done: whether nothing is left to be trained.
    """

    signal: Signals | None
    failed: dict[str, str]
    outcomes: frozenset[Outcome] = frozenset()
    done: bool = False


class Wanted(Protocol):
    """Which runs a series wants, by what became of those so far."""

    def runs(self, results: Mapping[str, Result], failed: Mapping[str, End]) -> Sequence[RunSpec]:
        """Return the runs that are known to be wanted, in their order."""

    def count(self, results: Mapping[str, Result], failed: Mapping[str, End]) -> int:
        """Return how many there will be."""

    def is_spare(self, name: str, results: Mapping[str, Result]) -> bool:
        """Return whether the results are whole without a run that diverged."""


class AllRuns:
    """Every run, in the order of the specs."""

    def __init__(self, specs: Sequence[RunSpec]) -> None:
        self._specs = specs

    def runs(self, _results: Mapping[str, Result], _failed: Mapping[str, End]) -> Sequence[RunSpec]:
        """Return all."""
        return self._specs

    def count(self, _results: Mapping[str, Result], _failed: Mapping[str, End]) -> int:
        """Return their number."""
        return len(self._specs)

    def is_spare(self, _name: str, _results: Mapping[str, Result]) -> bool:
        """Return False."""
        return False


class RunsLeft:
    """Schedule of the runs of a series that have no result yet.

    Args:
        folder: of the series, held by this process.
        wanted: the runs.
        console: to say on what is begun.
        jobs: how many are trained at once.
        pruned: whether finished runs lose their checkpoints.
        time_left: of what is trained here and elsewhere; None for these runs alone.
        work: of one run, as ``time_left`` counts it.

    Attributes:
        results: of the runs in the folder, by their names.
        failed: of the runs without a result, by their names.
    """

    def __init__(
        self,
        folder: Path,
        wanted: Wanted,
        console: Console,
        *,
        jobs: int = 1,
        pruned: bool = False,
        time_left: TimeLeft | None = None,
        work: float = 1.0,
    ) -> None:
        remove_partial_files(folder, re.compile(re.escape(RESULTS)))
        self._folder, self._wanted, self._console, self._jobs = folder, wanted, console, jobs
        self._pruned, self._time_left, self._work = pruned, time_left or TimeLeft(), work
        self.results, self.failed = read_results(folder), dict[str, End]()
        self._running = set[str]()
        if pruned:
            for spec in self._runs():
                if spec.name in self.results:
                    prune(folder / spec.name)

    @property
    def is_done(self) -> bool:
        """Whether every run that is wanted has ended."""
        return all(spec.name in self.results or spec.name in self.failed for spec in self._runs())

    def next(self) -> Job | None:
        """Return the next run, and say that it is begun."""
        ended = {**self.results, **self.failed}
        for spec in self._runs():
            if spec.name not in ended and spec.name not in self._running:
                self._running.add(spec.name)
                done = sum(other.name in ended for other in self._runs())
                count = self._wanted.count(self.results, self.failed)
                what = f"run {done + len(self._running)} of {count}"
                left = self._time_left.text(self._work * (count - done))
                print_begin(self._console, spec.name, what, left, self._jobs)
                return Job(spec, self._folder, logged=self._jobs > 1, wait=WAIT)
        return None

    def add(self, job: Job, end: End) -> None:
        """Keep a result, or the reason why there is none.

        Raises:
            InputError: the run got bad input, and none of the series has a result: all may have it.
        """
        name = job.spec.name
        self._running.discard(name)
        self._time_left.add(self._work)
        if end.outcome is Outcome.DONE:
            self.results[name] = Result(job.spec.group, end.scores, end.seconds)
            write_results(self._folder, self._in_order())
            if self._pruned:
                prune(job.folder)
        else:
            if end.outcome is Outcome.BAD_INPUT and not self._has_results():
                raise InputError(end.reason)
            self.failed[name] = end
        print_end(self._console, job, end, self._jobs)

    def ending(self, signal: Signals | None) -> Ending:
        """Return how the series ended."""
        failed = self.failed
        holes = {
            end.outcome
            for name, end in failed.items()
            if end.outcome not in (Outcome.DIVERGED, Outcome.OUT_OF_MEMORY)
            or not self._wanted.is_spare(name, self.results)
        }
        reasons = {name: end.reason for name, end in failed.items()}
        return Ending(signal, reasons, frozenset(holes), self.is_done)

    def _runs(self) -> Sequence[RunSpec]:
        return self._wanted.runs(self.results, self.failed)

    def _in_order(self) -> dict[str, Result]:
        """Return the results in an order that does not depend on which run ended first."""
        wanted = dict.fromkeys(spec.name for spec in self._runs())
        others = {name: own for name, own in self.results.items() if name not in wanted}
        return others | {name: self.results[name] for name in wanted if name in self.results}

    def _has_results(self) -> bool:
        return any(spec.name in self.results for spec in self._runs())


def train_runs(
    folder: Path,
    wanted: Wanted,
    workers: Workers,
    console: Console,
    deadline: float = math.inf,
    *,
    pruned: bool = False,
) -> Ending:
    """Train the runs of a series that are not done yet.

    Args:
        folder: of the series, held by this process.
        wanted: the runs.
        workers: that train them.
        console: to say on what is begun.
        deadline: as of ``Workers.run``.
        pruned: whether finished runs lose their checkpoints.

    Returns:
        How it ended.  A run whose numbers do not stay finite, that does not fit in memory, or whose
        process dies twice, is no result and does not end the others; when the series is called
        again it goes on from its last checkpoint.
    """
    left = RunsLeft(folder, wanted, console, jobs=workers.jobs, pruned=pruned)
    return left.ending(workers.run(left, deadline))


def print_begin(console: Console, name: str, what: str, time_left: str, jobs: int) -> None:
    """Say that a run is begun: ``what`` and the time left; of several at once in a line each."""
    if jobs > 1:
        text = f"{what}: {name}{time_left}"
    else:
        console.rule(name)
        text = f"{what}{time_left}"
    console.print(text, soft_wrap=True, highlight=False)


def print_end(console: Console, job: Job, end: End, jobs: int) -> None:
    """Say how a run ended, unless one that is trained alone has said so itself."""
    name = job.spec.name
    if end.outcome is not Outcome.DONE:
        text = f"{name}: {end.reason}"
    elif jobs > 1:
        criterion = Criterion.of(job.spec.recipe)
        score = end.scores.get(criterion.score)
        text = f"{name}: " + ("done" if score is None else f"{criterion.score} {score:.3f}")
    else:
        return
    console.print(text, soft_wrap=True, highlight=False)
