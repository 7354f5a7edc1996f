"""Groups of one or several series: chosen among tuned candidates, ranked, compared, named."""

import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..config.messages import nearest
from ..runs.baseline import Place, find_baselines
from ..runs.paired import Comparison, Difference, compare
from ..runs.ranking import OVERALL, key_of, mean_value, without_keys
from ..runs.scoring import Criterion
from ..utils.errors import InputError
from .series_record import RunRecord, SeriesRecord


class Group(NamedTuple):
    """Runs that differ in the seed alone.

    Attributes:
        series: the name of its series.
        name: its own, within the series.
        point: its settings.
        family: its settings without tuned ones.
        runs: with a result, by seed.
    """

    series: str
    name: str
    point: tuple[str, ...]
    family: tuple[str, ...]
    runs: list[RunRecord]

    @property
    def key(self) -> str:
        """What tells it from all others."""
        return f"{self.series}: {self.name}"

    @property
    def recipe(self) -> str:
        """The folder of its recipe; the series itself where that has one alone."""
        return self.name.partition("/")[0] or self.series

    @property
    def seeds(self) -> list[int]:
        """Of its runs."""
        return [run.seed for run in self.runs]

    def scores(self, score: str) -> dict[int, float]:
        """Return a score of its runs by their seeds."""
        return {run.seed: run.scores[score] for run in self.runs if score in run.scores}

    @property
    def conflict_rates(self) -> list[float]:
        """Of its runs, where steps had two tasks."""
        return [run.conflict_rate for run in self.runs if run.conflict_rate is not None]

    @property
    def sum_cosines(self) -> list[float]:
        """Of its runs' combined gradients with the plain sum, where known."""
        return [run.sum_cosine for run in self.runs if run.sum_cosine is not None]

    @property
    def minutes(self) -> float:
        """Of training, a run."""
        return statistics.mean(run.seconds for run in self.runs) / 60


class Family(NamedTuple):
    """Groups that differ in tuned settings alone.

    Attributes:
        groups: the candidates.
        seed: the first one, at which they are compared.
        decisions: of the candidates by key, the score that decides at that seed; None of one
            without a result there.
        chosen: the key of the best.
    """

    groups: list[Group]
    seed: int
    decisions: dict[str, float | None]
    chosen: str


class Study(NamedTuple):
    """What tables and pictures show.

    Attributes:
        groups: those shown, the best first.
        families: of all groups; none where nothing was tuned.
        tuned: keys of tuned settings.
        criterion: what groups are ordered by.
        scores: the names of all scores, ``overall`` last.
        asked: the settings of the baseline; empty for no comparison.
        baselines: the key of the baseline of each group, by key.
        compared: by score and the baseline's key.
    """

    groups: list[Group]
    families: list[Family]
    tuned: tuple[str, ...]
    criterion: Criterion
    scores: list[str]
    asked: str
    baselines: dict[str, str]
    compared: dict[str, dict[str, Comparison]]

    def difference(self, group: Group, score: str) -> Difference | None:
        """Return how a group differs from its baseline; None of a baseline, or without pairs."""
        comparison = self.compared.get(score, {}).get(self.baselines.get(group.key, ""))
        return None if comparison is None else comparison.differences.get(group.key)

    def is_baseline(self, group: Group) -> bool:
        """Return whether others are compared with a group."""
        return group.key in self.baselines.values()

    @property
    def main_scores(self) -> list[str]:
        """The deciding score of each task, and ``overall``."""
        return [score for score in self.scores if "." not in score]


def make_study(
    records: Sequence[SeriesRecord], compare_to: str = "", tuned: Sequence[str] = ()
) -> Study:
    """Return the groups of some series, ranked and compared.

    Args:
        records: of the series.
        compare_to: settings of the baseline, ``key=value,…``; empty for none.
        tuned: keys of settings of which each family keeps the best value at its first seed.

    Raises:
        InputError: no run has a result, there is no such key or baseline, or a family has no score
            to choose by.
    """
    if not any(record.runs for record in records):
        raise InputError("--series: none of these has a run with a result; train some first")
    candidates = _groups(records, tuned)
    families = _families(candidates) if tuned else []
    chosen = {family.chosen for family in families}
    groups = [group for group in candidates if not tuned or group.key in chosen]
    criterion = common_criterion(run.criterion for group in groups for run in group.runs)
    groups.sort(key=lambda group: -mean_value(criterion, [run.scores for run in group.runs]))
    scores = list(dict.fromkeys(s for group in groups for run in group.runs for s in run.scores))
    scores.sort(key="overall".__eq__)
    places = {group.key: Place(group.series, group.recipe, group.family) for group in groups}
    baselines = find_baselines(compare_to, places) if compare_to else {}
    compared = {score: _compared(groups, baselines, score) for score in scores}
    return Study(groups, families, tuple(tuned), criterion, scores, compare_to, baselines, compared)


def common_criterion(criteria: Iterable[Criterion]) -> Criterion:
    """Return what decides in all runs, or the overall score where that differs."""
    found = set(criteria)
    return found.pop() if len(found) == 1 else OVERALL


def labels(groups: Sequence[Group]) -> dict[str, str]:
    """Return short names of groups by key: the settings that differ, more where that is not enough.

    A setting is its value alone where all groups with settings have it.
    """
    points = {group.key: dict(map(_split, group.family)) for group in groups}
    shown = differing_keys(points.values())
    alone = {key for key in shown if all(key in point for point in points.values() if point)}
    found = {group.key: _names(group, _short(points[group.key], shown, alone)) for group in groups}
    return {
        key: next((name for name in names if _tells(name, key, found)), names[-1])
        for key, names in found.items()
    }


def differing_keys(points: Iterable[Mapping[str, str]]) -> list[str]:
    """Return the keys whose values differ among points, those that some lack included."""
    points = list(points)
    keys = dict.fromkeys(key for point in points for key in point)
    return [key for key in keys if len({point.get(key) for point in points}) > 1]


def settings_of(group: Group) -> dict[str, str]:
    """Return the values of a group's settings by their keys."""
    return dict(map(_split, group.point))


def _split(setting: str) -> tuple[str, str]:
    key, _, value = setting.partition("=")
    return key.strip(), value.strip()


def _short(point: Mapping[str, str], keys: Sequence[str], alone: Collection[str]) -> str:
    own = [(key, point[key]) for key in keys if key in point]
    return ", ".join(value if key in alone else f"{key}={value}" for key, value in own)


def _names(group: Group, settings: str) -> list[str]:
    """Return what a group could be called, the shortest first."""
    of_recipe = (group.recipe, settings)
    parts = [(settings or group.recipe,), of_recipe, (group.series, settings)]
    return [" ".join(filter(None, own)) for own in (*parts, (group.series, *of_recipe))]


def _tells(name: str, key: str, found: Mapping[str, Collection[str]]) -> bool:
    """Return whether a name cannot be taken for that of another group."""
    return not any(name in names for other, names in found.items() if other != key)


def _groups(records: Iterable[SeriesRecord], tuned: Collection[str]) -> list[Group]:
    found: dict[tuple[str, str], list[RunRecord]] = {}
    for record in records:
        for run in record.runs:
            found.setdefault((record.name, run.group), []).append(run)
    keys = dict.fromkeys(
        key_of(setting) for runs in found.values() for run in runs for setting in run.point
    )
    for key in tuned:
        if key_of(key) not in keys:
            hint = nearest(key, keys) if keys else "; they have no settings of their own"
            raise InputError(f"--tuned {key}: no group is told by it{hint}")
    return [
        Group(series, name, runs[0].point, without_keys(runs[0].point, tuned), runs)
        for (series, name), own in found.items()
        for runs in [sorted(own, key=lambda run: run.seed)]
    ]


def _families(groups: Iterable[Group]) -> list[Family]:
    found: dict[tuple[str, str, tuple[str, ...]], list[Group]] = {}
    for group in groups:
        found.setdefault((group.series, group.recipe, group.family), []).append(group)
    return list(map(_family, found.values()))


def _family(groups: list[Group]) -> Family:
    seed = min(seed for group in groups for seed in group.seeds)
    first = {group.key: next((r for r in group.runs if r.seed == seed), None) for group in groups}
    known = {
        key: run.sign * run.decision
        for key, run in first.items()
        if run is not None and run.decision is not None
    }
    if not known:
        raise InputError(
            f"--tuned: {groups[0].key} and those that differ from it in tuned settings alone have "
            f"no score at seed {seed} to choose by; leave the option out"
        )
    decisions = {key: None if run is None else run.decision for key, run in first.items()}
    return Family(groups, seed, decisions, max(known, key=lambda key: known[key]))


def _compared(
    groups: Sequence[Group], baselines: Mapping[str, str], score: str
) -> dict[str, Comparison]:
    """Return the comparisons by a score, one for each baseline that has it."""
    scores = {group.key: group.scores(score) for group in groups}
    return {
        baseline: compare(
            {key: own for key, own in scores.items() if own and baselines[key] == baseline},
            baseline,
        )
        for baseline in dict.fromkeys(baselines.values())
        if scores[baseline]
    }
