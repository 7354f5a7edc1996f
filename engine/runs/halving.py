"""Successive halving: many candidates for few steps, the best for more.

Every candidate is trained for the steps of the first rung.  The best 1/eta of them by the dev score
that decides (``best_of``) go on to the second, with eta times the steps, and so on to the last
rung, which ends where the recipe ends (Jamieson and Talwalkar 2016, "Non-stochastic Best Arm
Identification and Hyperparameter Optimization"; one bracket of Hyperband, Li et al. 2018,
"Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization").

A rung stops the run of the recipe early and goes on from its checkpoint; it does not train a
shorter run.  So the learning rates are those of all of max_steps, nothing is trained twice, and
the runs of the last rung have the weights and scores that they would have had without rungs.

``halving.json`` has the scores at each rung.  Everything else follows from them, so that the series
goes on from it wherever it was cut off.
"""

import itertools
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os.path import isfile
from pathlib import Path
from signal import Signals
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from rich.console import Console

from ..config.recipe import Recipe
from ..data.rows import shorten
from ..utils.errors import InputError
from ..utils.files import remove_partial_files, write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes
from .experiments import Result, RunSpec, TimeLeft, read_results
from .job import End, Job, Outcome, Workers
from .ranking import mean_value
from .resume import check_scores_of
from .run import Run
from .schedule import WAIT, AllRuns, Ending, RunsLeft, print_begin, print_end
from .scoring import Criterion, score_names, score_splits

RECORD = "halving.json"

GOES_ON, STOPPED, FAILED, FINISHED = "goes on", "stopped", "failed", "finished"
"""Outcomes of a candidate at a rung; empty while they are open."""


class Plan(NamedTuple):
    """Plan of a successive halving.

    Attributes:
        steps: of each rung, counted from the beginning of a run; the last are all of its steps.
        eta: of so many candidates one goes on.
        candidates: the runs of each candidate, which differ in the seed, by its group.
    """

    steps: tuple[int, ...]
    eta: int
    candidates: dict[str, list[RunSpec]]

    @property
    def specs(self) -> list[RunSpec]:
        """All runs."""
        return [spec for runs in self.candidates.values() for spec in runs]

    @property
    def criterion(self) -> Criterion:
        """What candidates are ranked by, the same for all."""
        return Criterion.of(next(iter(self.candidates.values()))[0].recipe)

    def survivors(self, count: int) -> int:
        """Return how many of ``count`` candidates of a rung go on."""
        return max(1, count // self.eta)


class Failure(BaseModel):
    """Failure of a run: the steps of the rung that it did not reach, and why."""

    steps: int
    reason: str


class Record(BaseModel):
    """``halving.json``, without what follows from the rest."""

    model_config = ConfigDict(extra="ignore")

    eta: int
    steps: list[int]
    runs: list[str]
    """Names of all runs of all candidates."""
    scores: dict[str, dict[int, dict[str, FiniteFloat]]] = {}
    """Dev scores of each run, by the steps of a rung, but the last."""
    failed: dict[str, Failure] = {}
    """Runs whose numbers did not stay finite, that do not fit in memory, or that died twice."""


class Place(NamedTuple):
    """Place of a candidate at a rung.

    Attributes:
        group: the candidate.
        scores: of its runs there; none where they failed or are not trained yet.
        outcome: one of those above.
        reason: why it failed.
    """

    group: str
    scores: list[dict[str, float]]
    outcome: str
    reason: str = ""


class Rung(NamedTuple):
    """A rung: its steps, and its candidates, the best first and those that failed last."""

    steps: int
    places: list[Place]

    @property
    def is_open(self) -> bool:
        """Whether a run of it is still to be trained."""
        return any(not place.outcome for place in self.places)


def plan_halving(specs: Sequence[RunSpec], min_steps: int, eta: int) -> Plan:
    """Plan the rungs of a series.

    Args:
        specs: its runs; those of a group are one candidate, ranked by the mean of their scores.
        min_steps: of the first rung.
        eta: the factor from rung to rung.

    Raises:
        InputError: there is one candidate, their scores do not compare, or their steps do not fit.
    """
    candidates: dict[str, list[RunSpec]] = {}
    for spec in specs:
        candidates.setdefault(spec.group, []).append(spec)
    first, *others = (runs[0] for runs in candidates.values())
    if not others:
        raise InputError(
            "--halving: there is one candidate; give several, by --grid, --random or recipes"
        )
    most = _all_steps(first)
    for other in others:
        if _all_steps(other) != most:
            raise InputError(
                f"--halving: max_steps differ, {most} of {first.group} and {_all_steps(other)} of "
                f"{other.group}; give all the same by --max-steps"
            )
        if score_names(other.recipe) != score_names(first.recipe):
            raise InputError(
                f"--halving: {first.group} and {other.group} have scores on different tasks or by "
                "different metrics, which do not compare; sweep each recipe by itself"
            )
        if other.recipe.best_of != first.recipe.best_of:
            raise InputError(
                f"--halving: best_of differs, {first.recipe.best_of} of {first.group} and "
                f"{other.recipe.best_of} of {other.group}, so that candidates do not compare; give "
                "all the same"
            )
    if min_steps >= most:
        raise InputError(
            f"--min-steps {min_steps}: expected fewer than the {most} steps of the whole run; "
            "lower it, or raise --max-steps"
        )
    steps = [min_steps]
    while steps[-1] * eta < most:
        steps.append(steps[-1] * eta)
    for spec in (first, *others):
        for stop in steps:
            _check_scored(spec, stop)
    return Plan((*steps, most), eta, candidates)


class Rungs:
    """Schedule of the rungs of a plan; ``halving.json`` is written after every run.

    Args:
        folder: of the series, held by this process.
        plan: the rungs.
        console: to say on what is begun.
        jobs: how many runs are trained at once.
        pruned: whether finished runs lose their checkpoints.

    Attributes:
        record: of what has ended so far.
        outcomes: how runs without a result ended in this session.

    Raises:
        InputError: the folder has a record of another plan.
    """

    def __init__(
        self, folder: Path, plan: Plan, console: Console, *, jobs: int = 1, pruned: bool = False
    ) -> None:
        remove_partial_files(folder, re.compile(re.escape(RECORD)))
        self._folder, self._plan, self._console = folder, plan, console
        self._jobs, self._pruned, self._time_left = jobs, pruned, TimeLeft()
        self.record = read_record(folder, plan)
        self.outcomes = set[Outcome]()
        self._running = set[str]()
        self._last: RunsLeft | None = None
        _write(folder, plan, self.record)

    def next(self) -> Job | None:
        """Return the next run of the rung at hand, and say that it is begun."""
        plan, record = self._plan, self.record
        rung = rungs(plan, record, {})[-1]
        if rung.steps == plan.steps[-1]:
            return self._last_rung(rung).next()
        for spec in _runs_to_train(plan, record, rung):
            if spec.name not in self._running:
                self._running.add(spec.name)
                left = _steps_left(plan, record, read_results(self._folder))
                what = f"up to step {rung.steps} of {plan.steps[-1]}"
                print_begin(self._console, spec.name, what, self._time_left.text(left), self._jobs)
                return Job(spec, self._folder, rung.steps, self._jobs > 1, WAIT)
        return None

    def add(self, job: Job, end: End) -> None:
        """Keep the score of a run, or the reason why there is none.

        Raises:
            InputError: the run got bad input.
        """
        if end.outcome is Outcome.BAD_INPUT:
            raise InputError(end.reason)
        name, steps = job.spec.name, self._plan.steps[-1] if job.steps is None else job.steps
        if job.steps is None:
            assert self._last is not None, "it was begun"
            self._last.add(job, end)
        else:
            self._running.discard(name)
            self._time_left.add(_work(self._plan, steps))
            print_end(self._console, job, end, self._jobs)
        if end.outcome is not Outcome.DONE:
            self.outcomes.add(end.outcome)
            self.record.failed[name] = Failure(steps=steps, reason=end.reason)
        elif job.steps is not None:
            self.record.scores.setdefault(name, {})[steps] = end.scores
        _write(self._folder, self._plan, self.record)

    def ending(self, signal: Signals | None) -> Ending:
        """Return how the series ended."""
        done = is_done(self._plan, rungs(self._plan, self.record, read_results(self._folder)))
        return Ending(signal, _reasons(self.record), frozenset(self.outcomes), done)

    def _last_rung(self, rung: Rung) -> RunsLeft:
        """Return the schedule of the last rung, whose runs are trained to their end."""
        if self._last is None:
            self._last = RunsLeft(
                self._folder,
                AllRuns(list(_runs_to_train(self._plan, self.record, rung))),
                self._console,
                jobs=self._jobs,
                pruned=self._pruned,
                time_left=self._time_left,
                work=_last_work(self._plan, self.record),
            )
        return self._last


def train_halving(
    folder: Path,
    plan: Plan,
    workers: Workers,
    console: Console,
    deadline: float = math.inf,
    *,
    pruned: bool = False,
) -> Ending:
    """Train what the rungs of a plan still need, and write ``halving.json``.

    Args:
        folder: of the series, held by this process.
        plan: the rungs.
        workers: that train the runs.
        console: to say on what is begun.
        deadline: as of ``Workers.run``.
        pruned: whether finished runs lose their checkpoints.

    Returns:
        How it ended; a run that failed has no result, and does not end the others.

    Raises:
        InputError: the folder has a record of another plan, or a run in it has more steps already
            than the rung that it is to be ranked at.
    """
    schedule = Rungs(folder, plan, console, jobs=workers.jobs, pruned=pruned)
    return schedule.ending(workers.run(schedule, deadline))


def rungs(plan: Plan, record: Record, results: Mapping[str, Result]) -> list[Rung]:
    """Return the rungs up to the one that is at hand, ranked.

    Args:
        plan: the rungs.
        record: scores at all of them but the last.
        results: scores at the last one, which are those of the runs' best epochs.
    """
    found, alive = list[Rung](), list(plan.candidates)
    for steps in plan.steps[:-1]:
        if len(alive) < 2:  # nothing is left to be decided
            break
        places = [_place(plan, record, group, steps) for group in alive]
        rung = Rung(steps, _sorted(plan, places))
        if rung.is_open:
            return [*found, rung]
        ranked = [place.group for place in rung.places if place.outcome != FAILED]
        alive = ranked[: plan.survivors(len(alive))]
        decided = [
            place._replace(outcome=GOES_ON) if place.group in alive else place
            for place in rung.places
        ]
        found.append(Rung(steps, decided))
    last = [_last_place(plan, record, results, group) for group in alive]
    return [*found, Rung(plan.steps[-1], _sorted(plan, last))]


def is_done(plan: Plan, found: Sequence[Rung]) -> bool:
    """Return whether nothing is left to be trained."""
    return found[-1].steps == plan.steps[-1] and not found[-1].is_open


def read_record(folder: Path, plan: Plan) -> Record:
    """Return the record of a plan so far, without scores where there is none.

    Raises:
        InputError: it is damaged, was made by another plan or with other settings.
    """
    file = folder / RECORD
    expected = Record(eta=plan.eta, steps=list(plan.steps), runs=[spec.name for spec in plan.specs])
    if not file.exists():
        return expected
    try:
        record = Record.model_validate_json(read_bytes(file))
        expected_names = set(names_of_scores(plan))
        for name, by_steps in record.scores.items():
            if any(scores.keys() != expected_names for scores in by_steps.values()):
                raise ValueError(f"scores of {shorten(name)} are not those of its tasks")
    except ValueError as error:
        raise InputError(
            f"{file}: not the record of a halving ({_first_line(error)}); give another --out"
        ) from None
    for what in ("eta", "steps", "runs"):
        before, now = getattr(record, what), getattr(expected, what)
        if before != now:
            other = "other candidates" if what == "runs" else f"{what} {before}, now {now}"
            raise InputError(f"{file}: was made with {other}; give the same, or another --out")
    for spec in plan.specs:
        if spec.name in record.scores:
            if not isfile(folder / spec.name / "recipe.toml"):
                raise InputError(
                    f"{folder / spec.name}: is missing, so that the settings of its scores in "
                    f"{RECORD} are unknown; give another --out"
                )
            check_scores_of(spec.recipe, folder / spec.name)
    return record


def score_newest(run: Run, device: torch.device) -> dict[str, float]:
    """Return the dev scores of a run's newest checkpoint; NaN where an output is not finite."""
    model, _ = run.trained_model(device, newest=True, merged=False)
    dev_sets = {task: run.split(task, "dev") for task in run.recipe.tasks}
    return score_splits(model, dev_sets, run.recipe, choose_thresholds=True)


def names_of_scores(plan: Plan) -> list[str]:
    """Return the names of the scores of every candidate, ``overall`` last."""
    return [*score_names(plan.specs[0].recipe), "overall"]


def _all_steps(spec: RunSpec) -> int:
    """Return the steps of all phases of a run.

    Raises:
        InputError: they are not given.
    """
    phases = spec.recipe.in_phases
    for name, phase in phases.items():
        if not phase.max_steps:
            where = f"phases.{name}.max_steps" if name else "max_steps"
            raise InputError(
                f"--halving: {where} of {spec.group} is not given, so that the rungs have no end; "
                "give --max-steps"
            )
    return sum(phase.max_steps for phase in phases.values())


def _check_scored(spec: RunSpec, step: int) -> None:
    """Check that a rung ends in a phase that trains tasks.

    Raises:
        InputError: there is nothing to rank by.
    """
    name, phase = _phase_at(spec.recipe, step)
    if not phase.scored:
        where = f"phase {name} of {spec.group}" if name else spec.group
        raise InputError(
            f"--halving: after {step} steps {where} has trained no task, so that there is no score "
            "to rank by; " + ("raise --min-steps" if name else "leave --halving out")
        )


def _phase_at(recipe: Recipe, step: int) -> tuple[str, Recipe]:
    """Return the phase that the last of ``step`` steps belongs to."""
    phases, ends = (
        recipe.in_phases,
        itertools.accumulate(phase.max_steps for phase in recipe.in_phases.values()),
    )
    return next(item for item, end in zip(phases.items(), ends, strict=True) if step <= end)


def _sorted(plan: Plan, places: Iterable[Place]) -> list[Place]:
    return sorted(places, key=lambda place: order(plan, place))


def order(plan: Plan, place: Place) -> tuple[bool, float]:
    """Return a key that sorts the best first and those that failed last."""
    if not place.scores:
        return place.outcome == FAILED, math.inf
    return place.outcome == FAILED, -mean_value(plan.criterion, place.scores)


def _place(plan: Plan, record: Record, group: str, steps: int) -> Place:
    """Return the place of a candidate at a rung, stopped there unless it is open or failed."""
    runs = plan.candidates[group]
    for spec in runs:
        failure = record.failed.get(spec.name)
        if failure is not None and failure.steps == steps:
            return Place(group, [], FAILED, failure.reason)
    scores = [record.scores.get(spec.name, {}).get(steps) for spec in runs]
    known = [own for own in scores if own is not None]
    if len(known) < len(runs):
        return Place(group, [], "")
    return Place(group, known, STOPPED)


def _last_place(plan: Plan, record: Record, results: Mapping[str, Result], group: str) -> Place:
    runs = plan.candidates[group]
    place = _place(plan, record, group, plan.steps[-1])
    if place.outcome == FAILED or not all(spec.name in results for spec in runs):
        return place
    return Place(group, [results[spec.name].scores for spec in runs], FINISHED)


def _runs_to_train(plan: Plan, record: Record, rung: Rung) -> Iterator[RunSpec]:
    for place in rung.places:
        for spec in plan.candidates[place.group]:
            trained = rung.steps in record.scores.get(spec.name, {})
            if place.outcome != FAILED and not trained:
                yield spec


def _work(plan: Plan, steps: int) -> int:
    """Return the steps of a run from the rung before ``steps`` to that."""
    before = (0, *plan.steps)[plan.steps.index(steps)]
    return steps - before


def _last_work(plan: Plan, record: Record) -> int:
    """Return the steps of a run in the last rung."""
    found = rungs(plan, record, {})
    return plan.steps[-1] - (found[-2].steps if len(found) > 1 else 0)


def _steps_left(plan: Plan, record: Record, results: Mapping[str, Result]) -> int:
    """Return the steps that are still to be trained, of all runs, if no more of them fail."""
    rung = rungs(plan, record, {})[-1]
    seeds = len(plan.specs) // len(plan.candidates)
    runs = sum(spec.name not in results for spec in _runs_to_train(plan, record, rung))
    if rung.steps == plan.steps[-1]:
        return _last_work(plan, record) * runs
    left = _work(plan, rung.steps) * runs
    count, before = plan.survivors(len(rung.places)), rung.steps
    for steps in plan.steps[plan.steps.index(rung.steps) + 1 :]:
        left += (steps - before) * count * seeds
        count, before = plan.survivors(count), steps
    return left


def _reasons(record: Record) -> dict[str, str]:
    return {name: failure.reason for name, failure in record.failed.items()}


def _first_line(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors(include_url=False, include_input=False)[0]
        return shorten(": ".join([".".join(map(str, problem["loc"])), problem["msg"]]))
    return str(error)


def _write(folder: Path, plan: Plan, record: Record) -> None:
    """Write the record with the rankings that follow from it, unless the file has them."""
    found = rungs(plan, record, read_results(folder))
    content = record.model_dump(mode="json") | {
        "ranked_by": plan.criterion.score,
        "candidates": {group: list(runs[0].point) for group, runs in plan.candidates.items()},
        "rungs": [
            {
                "steps": rung.steps,
                "ranking": [
                    _ranked(plan, rank, place) for rank, place in enumerate(rung.places, start=1)
                ],
            }
            for rung in found
        ],
    }
    text, file = dump_json(content, indent=2) + "\n", folder / RECORD
    if not file.exists() or read_bytes(file) != text.encode():
        write_text(file, text)


def _ranked(plan: Plan, rank: int, place: Place) -> dict[str, Any]:
    own_scores = [scores[plan.criterion.score] for scores in place.scores]
    score = statistics.mean(own_scores) if own_scores else None
    own = {"rank": rank, "candidate": place.group, "score": score, "outcome": place.outcome}
    return own | ({"reason": place.reason} if place.reason else {})
