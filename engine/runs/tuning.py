"""Settings chosen by dev score, point by point: the first seed tries all, the others the best one.

``tuned.json`` says for each point which candidate was chosen, and the scores of all.  It follows
from ``results.json`` and is not read again, but for the points of other commands.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter
from rich.console import Console

from ..utils.errors import InputError
from ..utils.files import write_text
from ..utils.json_text import dump_json
from ..utils.untrusted_io import read_bytes
from .experiments import Result, RunSpec
from .job import End
from .ranking import mean_value
from .scoring import Criterion, score_names

RECORD = "tuned.json"


class Point(NamedTuple):
    """A point of a grid, of which the best candidate is kept.

    Attributes:
        name: its group, were nothing tuned.
        keys: of the settings that are tuned, the last ones of the candidates' points.
        candidates: the runs of each candidate, which differ in the seed, by its group.
    """

    name: str
    keys: tuple[str, ...]
    candidates: dict[str, list[RunSpec]]

    @property
    def seeds(self) -> int:
        """How many runs a candidate has."""
        return len(next(iter(self.candidates.values())))

    @property
    def criterion(self) -> Criterion:
        """What candidates are compared by."""
        return Criterion.of(next(iter(self.candidates.values()))[0].recipe)

    def settings(self, group: str) -> tuple[str, ...]:
        """Return the tuned settings of a candidate."""
        return self.candidates[group][0].point[-len(self.keys) :]

    def score(self, group: str, results: Mapping[str, Result]) -> float:
        """Return the first seed's score of a finished candidate, higher being better."""
        return mean_value(self.criterion, [results[self.first(group)].scores])

    def first(self, group: str) -> str:
        """Return the name of the run that decides on a candidate."""
        return self.candidates[group][0].name

    def is_open(self, results: Mapping[str, object], failed: Mapping[str, object]) -> bool:
        """Return whether a candidate is still to be tried."""
        names = map(self.first, self.candidates)
        return any(name not in results and name not in failed for name in names)

    def best(self, results: Mapping[str, Result]) -> str | None:
        """Return the best of the candidates that have a result, the first of equals; or None."""
        done = [group for group in self.candidates if self.first(group) in results]
        return max(done, key=lambda group: self.score(group, results), default=None)


class Tuning:
    """The runs of a series of which each point keeps its best candidate.

    Args:
        points: of the series.

    Raises:
        InputError: candidates of a point do not compare.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = points
        for point in points:
            _check(point)

    @property
    def specs(self) -> list[RunSpec]:
        """All runs of all candidates; most of them are never trained."""
        found = (runs for point in self.points for runs in point.candidates.values())
        return list(chain.from_iterable(found))

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the settings that are tuned, the same at all points."""
        return self.points[0].keys

    def runs(self, results: Mapping[str, Result], failed: Mapping[str, End]) -> list[RunSpec]:
        """Return every candidate's first run, and the others of those that were chosen."""
        found = [runs[0] for point in self.points for runs in point.candidates.values()]
        for point in self.points:
            best = point.best(results)
            if best is not None and not point.is_open(results, failed):
                found += point.candidates[best][1:]
        return found

    def count(self, results: Mapping[str, Result], failed: Mapping[str, End]) -> int:
        """Return how many runs there will be."""
        count = 0
        for point in self.points:
            fails = not point.is_open(results, failed) and point.best(results) is None
            count += len(point.candidates) + (0 if fails else point.seeds - 1)
        return count

    def is_spare(self, name: str, results: Mapping[str, Result]) -> bool:
        """Return whether a run is a candidate's first, and its point has a better candidate."""
        for point in self.points:
            if name in map(point.first, point.candidates):
                return point.best(results) is not None
        return False

    def others(self, results: Mapping[str, Result], failed: Mapping[str, str]) -> set[str]:
        """Return the groups that were not chosen."""
        found = set[str]()
        for point in self._decided(results, failed):
            found |= point.candidates.keys() - {point.best(results)}
        return found

    def write(self, folder: Path, results: Mapping[str, Result], failed: Mapping[str, str]) -> None:
        """Write the choices so far into ``tuned.json``, which keeps those of other points.

        Raises:
            InputError: what is there is no such file.
        """
        file = folder / RECORD
        before = _read(file)
        own = {
            point.name: _content(point, results, failed) for point in self._decided(results, failed)
        }
        if own and before | own != before:
            write_text(file, dump_json(before | own, indent=2) + "\n")

    def print(
        self, console: Console, results: Mapping[str, Result], failed: Mapping[str, str]
    ) -> None:
        """Print how many runs there were, and a line for each choice."""
        made = sum(spec.name in results for spec in self.specs)
        keys = " and ".join(self.keys)
        criteria = ", ".join(dict.fromkeys(str(point.criterion) for point in self.points))
        console.print(
            f"{made} runs in all; {keys} by the dev score of the first seed, {criteria} "
            f"({RECORD} has all scores):",
            soft_wrap=True,
            highlight=False,
        )
        for point in self._decided(results, failed):
            line = f"{point.name}: {_line(point, results)}"
            console.print(line, soft_wrap=True, highlight=False)

    def _decided(self, results: Mapping[str, Result], failed: Mapping[str, str]) -> Iterator[Point]:
        return (point for point in self.points if not point.is_open(results, failed))


def check_record(folder: Path) -> None:
    """Check that choices can be added to those in a folder.

    Raises:
        InputError: what is there is no ``tuned.json``.
    """
    _read(folder / RECORD)


def _check(point: Point) -> None:
    """Check that the candidates of a point compare.

    Raises:
        InputError: two are the same, or begin with other seeds; or they have no scores, or not of
            the same tasks and metrics.
    """
    first, *others = (runs[0] for runs in point.candidates.values())
    known = dict[str, str]()
    for spec in (first, *others):
        if spec.recipe.seed != first.recipe.seed:
            raise InputError(
                f"--tune: {first.group} and {spec.group} begin with other seeds, and chance is not "
                "tuned; repeat runs by --seeds"
            )
        same = known.setdefault(dump_json(spec.recipe.model_dump(mode="json")), spec.group)
        if same != spec.group:
            raise InputError(
                f"--tune: {same} and {spec.group} have the same settings; give each value once"
            )
    for spec in (first, *others):
        if not spec.recipe.is_scored:
            raise InputError(
                f"--tune: {spec.group} trains no task, so that no dev score decides; leave --tune "
                "out"
            )
    for other in others:
        scored = score_names(other.recipe) == score_names(first.recipe)
        if not scored or Criterion.of(other.recipe) != Criterion.of(first.recipe):
            raise InputError(
                f"--tune: {first.group} and {other.group} are scored on other tasks or by other "
                "metrics, which do not compare; put that key into --grid"
            )


def _content(
    point: Point, results: Mapping[str, Result], failed: Mapping[str, str]
) -> dict[str, Any]:
    best = point.best(results)
    return {
        "chosen": best,
        "settings": [] if best is None else list(point.settings(best)),
        "seed": next(iter(point.candidates.values()))[0].recipe.seed,
        "decided_by": point.criterion.score,
        "candidates": [
            {
                "candidate": group,
                "settings": list(point.settings(group)),
                "score": _shown(point, group, results),
            }
            | ({} if point.first(group) in results else {"reason": failed[point.first(group)]})
            for group in point.candidates
        ],
    }


def _line(point: Point, results: Mapping[str, Result]) -> str:
    """Return ``lr=1e-3 of lr=1e-4 0.402, lr=1e-3 0.512, lr=1e-2 without a result``."""
    best = point.best(results)
    scores = []
    for group in point.candidates:
        score = _shown(point, group, results)
        text = "without a result" if score is None else f"{score:.3f}"
        scores.append(f"{','.join(point.settings(group))} {text}")
    chosen = "none" if best is None else ",".join(point.settings(best))
    return f"{chosen} of {', '.join(scores)}"


def _shown(point: Point, group: str, results: Mapping[str, Result]) -> float | None:
    """Return the score that decided, as it is shown; None without one."""
    found = results.get(point.first(group))
    return None if found is None else found.scores.get(point.criterion.score)


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        return TypeAdapter(dict[str, Any]).validate_json(read_bytes(file))
    except ValueError:
        raise InputError(f"{file}: not the choices of a tuning; move it elsewhere") from None
