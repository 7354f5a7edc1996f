"""One run of a series: what is to be trained, and how that ended."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from os.path import isfile
from pathlib import Path
from signal import Signals
from typing import NamedTuple, Protocol

from ..data.cache import Reading
from ..utils.errors import DivergedError, InputError, OutOfMemoryError
from ..utils.files import check_own_file, explained
from .experiments import RunSpec, training_seconds
from .folder import OUTPUT, claimed
from .prune import has_scores_alone
from .resume import check_scores_of, resume
from .run import Run, open_run
from .scoring import read_scores

_PLAIN = Reading()

TrainRun = Callable[[Run, int | None], Signals | None]
"""Trains a run up to so many steps (None: to its end), or until a signal, which it returns."""
ScoreRun = Callable[[Run], Mapping[str, float]]
"""Returns the dev scores of a run's newest checkpoint."""


class Outcome(StrEnum):
    """End of a run."""

    DONE = "done"
    DIVERGED = "diverged"
    OUT_OF_MEMORY = "out of memory"
    BAD_INPUT = "bad input"
    DIED = "died"
    """Its process was killed, or failed by a defect."""
    STOPPED = "stopped"
    """By a signal, with a checkpoint if it had begun."""


class Job(NamedTuple):
    """A run that is to be trained.

    Attributes:
        spec: its settings.
        series: the folder of the series.
        steps: after which it stops and is scored; None for its end.
        logged: whether what it prints goes into a file of its folder.
        wait: seconds for which to wait for a process that trains it already.
    """

    spec: RunSpec
    series: Path
    steps: int | None = None
    logged: bool = False
    wait: float = 0.0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.series / self.spec.name


class End(NamedTuple):
    """How a job ended.

    Attributes:
        outcome: in a word.
        reason: of an end without a result.
        scores: dev scores, of the best epoch, or of the checkpoint at ``Job.steps``.
        seconds: that the run's training steps took, all sessions together; 0 at ``Job.steps``.
        signal: that stopped it.
    """

    outcome: Outcome
    reason: str = ""
    scores: dict[str, float] = {}
    seconds: float = 0.0
    signal: Signals | None = None


class Schedule(Protocol):
    """What is to be trained, in which order."""

    def next(self) -> Job | None:
        """Return the next run; None if there is none before another one ends."""

    def add(self, job: Job, end: End) -> None:
        """Take note of an end."""


class Workers(Protocol):
    """Processes that train the runs of a series.

    Attributes:
        jobs: how many runs are trained at once.
        tried_again: why runs were begun a second time, by their names.
    """

    jobs: int
    tried_again: dict[str, str]

    def run(self, schedule: Schedule, deadline: float = math.inf) -> Signals | None:
        """Train what a schedule holds.

        Args:
            schedule: of the runs.
            deadline: by the monotonic clock; no run is begun from then on, and those that are being
                trained may be stopped.

        Returns:
            The signal that stopped it, or None.
        """


class InProcess:
    """Train the runs of a series in this process, one after the other.

    Args:
        train_run: trains one.
        score_run: scores one that stops early.
        reading: how their data are read.
    """

    def __init__(
        self,
        train_run: TrainRun,
        score_run: ScoreRun | None = None,
        reading: Reading = _PLAIN,
    ) -> None:
        self._train_run, self._score_run, self._reading = train_run, score_run, reading
        self.jobs = 1
        self.tried_again = dict[str, str]()

    def run(self, schedule: Schedule, deadline: float = math.inf) -> Signals | None:
        """Train what a schedule holds; what a run raises ends it."""
        while time.monotonic() < deadline and (job := schedule.next()) is not None:
            end = train_job(job, self._train_run, self._score_run, self._reading)
            if end.outcome is Outcome.STOPPED:
                return end.signal
            schedule.add(job, end)
        return None


def train_job(job: Job, train_run: TrainRun, score_run: ScoreRun | None, reading: Reading) -> End:
    """Begin or resume a run, train it, and return its scores; those of a pruned run are read.

    Raises:
        InputError: it cannot be trained; that its numbers do not stay finite, or that it does not
            fit in memory, is an end.
    """
    with claimed(job.folder, resumes=True, wait=job.wait), _logged(job):
        if job.steps is None and has_scores_alone(job.folder):
            check_scores_of(job.spec.recipe, job.folder)
            return _end_of(open_run(job.folder))
        run = resume(job.spec.recipe, job.folder, reading)
        _check_rung(job, run)
        try:
            if (signal := train_run(run, job.steps)) is not None:
                return End(Outcome.STOPPED, signal=signal)
            if job.steps is None:
                return _end_of(run)
            assert score_run is not None, "a run that stops early is scored"
            scores = dict(score_run(run))
            if not all(map(math.isfinite, scores.values())):
                raise DivergedError(f"dev scores at step {job.steps} are not finite")
            return End(Outcome.DONE, scores=scores)
        except DivergedError as error:
            return End(Outcome.DIVERGED, str(error))
        except OutOfMemoryError as error:
            return End(Outcome.OUT_OF_MEMORY, str(error))


def _end_of(run: Run) -> End:
    recipe = run.recipe
    scores = read_scores(run.folder, recipe.tasks).scores if recipe.is_scored else {}
    return End(Outcome.DONE, scores=scores, seconds=training_seconds(run.folder))


def _check_rung(job: Job, run: Run) -> None:
    """Refuse a run that has more steps than it is to be scored at.

    Raises:
        InputError: it has.
    """
    if job.steps is not None and (step := run.checkpoints.progress().step) > job.steps:
        raise InputError(
            f"{run.folder}: has {step} steps already, so that it cannot be ranked after "
            f"{job.steps}; give another --out"
        )


@contextmanager
def _logged(job: Job) -> Iterator[None]:
    """Send what this process prints into a file of the run from now on, if the job says so.

    It is sent there after the block, too.  A run that wrote nothing else leaves no file.
    """
    if not job.logged:
        yield
        return
    file = job.folder / OUTPUT
    check_own_file(file)
    with explained("write", file):
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        stream.flush()
        os.dup2(handle, number)
    os.close(handle)
    try:
        yield
    finally:
        if not isfile(job.folder / "recipe.toml"):
            file.unlink(missing_ok=True)
