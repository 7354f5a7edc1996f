"""Choose the thresholds above which logits are answered with yes: exact searches over all of them.

Between two neighbours of the sorted scores all thresholds give the same answers, so that N distinct
scores have N + 1 candidates: halfway between neighbours, below the smallest score and above the
largest one.  Where 0 (a probability of 1/2) lies between the same two, it is the candidate.  All
are tried, by counts that are summed up along the sorted scores, in O(N log N).  Of equally good
ones the nearest to 0 is taken.

One threshold for each of L labels maximises F1 of each label by itself (the macro mean), or the F1
score of all labels' counts (the micro mean) jointly: 2 TP / (predicted + positive) is a ratio of
sums over labels, whose maximum the algorithm of Dinkelbach (1967) finds in a few rounds, each of
which maximises 2 TP D - N predicted in each label, where N / D is the score so far (Pillai, Fumera
and Roli 2013 search it otherwise).  It counts in integers, so that it is exact.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

HALF, DEV, DEV_PER_LABEL = "half", "dev", "dev_per_label"
THRESHOLDS = (HALF, DEV, DEV_PER_LABEL)
"""What ``tasks.NAME.threshold`` of a recipe may be."""

_TIE = 1e-9
"""Scores by a metric count as equal within this, which their rounding is below."""

_UNCHANGED = ("average_precision",)
"""Metrics that are the same for every threshold."""

Bools = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
Logits = npt.NDArray[np.float32]


class Cuts(NamedTuple):
    """All candidates for a threshold on N scores of D distinct values, ascending.

    Attributes:
        thresholds: fp32 ``[D + 1]``.
        values: fp32 ``[D]``, the distinct scores.
        yes: int64 ``[D + 1]``, how many scores are above each threshold.
        true: int64 ``[D + 1]``, how many of those have a positive label.
        positive: positive labels.
        total: N.
    """

    thresholds: Logits
    values: Logits
    yes: Counts
    true: Counts
    positive: int
    total: int


def choose_thresholds(
    scores: Logits, labels: npt.NDArray[np.floating], metric: str, *, per_label: bool = False
) -> Logits:
    """Return the thresholds that give the best score by a metric, the nearest to 0 of equal ones.

    Args:
        scores: finite fp32 logits ``[N]``, or of several labels ``[N, L]``.
        labels: of the same shape, 0 or 1.
        metric: a name that :func:`deciding_metric` returns.
        per_label: choose one for each of L labels, not one for all.

    Returns:
        fp32 ``[1]``, or ``[L]``.
    """
    wanted = labels > 0
    if per_label:
        by_label = [_cuts(own, yes) for own, yes in zip(scores.T, wanted.T, strict=True)]
        if metric == "f1_micro":
            return _best_jointly(by_label)
        return np.array([_best(each, _f1(each)) for each in by_label], np.float32)
    cuts = _cuts(scores.ravel(), wanted.ravel())
    if scores.ndim == 2 and metric != "f1_micro":
        function = {"f1_macro": _mean_f1, "accuracy": _share_of_right_rows}[metric]
        return np.array([_best(cuts, function(cuts, scores, wanted))], np.float32)
    of_counts = _f1 if scores.ndim == 2 else _OF_COUNTS[metric]
    return np.array([_best(cuts, of_counts(cuts))], np.float32)


def deciding_metric(threshold: str, names: Sequence[str], *, several: bool) -> str:
    """Return the metric that a threshold is chosen by: the first one that depends on it.

    Args:
        threshold: DEV or DEV_PER_LABEL.
        names: of the task's metrics, the deciding one first.
        several: whether an example has several labels.

    Raises:
        ValueError: no metric can choose; the message says which could.
    """
    known = [*_OF_COUNTS] if not several else ["f1_micro", "f1_macro"]
    if several and threshold == DEV:
        known.append("accuracy")
    found = next((name for name in names if name not in _UNCHANGED), names[0])
    if found not in known:
        reason = "is the same for each" if found in _UNCHANGED else "cannot choose it"
        raise ValueError(f"{found} {reason}; name one of {', '.join(known)} before it in metrics")
    return found


def _cuts(scores: Logits, wanted: Bools) -> Cuts:
    """Return the candidates for scores ``[N]``."""
    order = np.argsort(scores, kind="stable")
    ordered = scores[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))  # of equal ones
    bounds = np.append(first, len(scores))
    below = np.append(0, np.cumsum(wanted[order]))
    positive, values = int(below[-1]), ordered[first]
    return Cuts(
        thresholds=_between(values),
        values=values,
        yes=len(scores) - bounds,
        true=positive - below[bounds],
        positive=positive,
        total=len(scores),
    )


def _between(values: Logits) -> Logits:
    """Return the candidates ``[D + 1]`` between ascending values ``[D]``; t is below ``x > t``."""
    inner = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    inner = np.where(inner < values[1:], inner, values[:-1])  # rounded up to the next value
    lowest = min(values[0] - np.float32(1), np.nextafter(values[0], np.float32(-np.inf)))
    highest = values[-1] + np.float32(1)
    found = np.concatenate(([lowest], inner, [highest])).clip(*_range())
    low, high = np.append(-np.inf, values), np.append(values, np.inf)
    return np.where((low <= 0) & (high > 0), np.float32(0), found).astype(np.float32)


def _range() -> tuple[np.float32, np.float32]:
    limits = np.finfo(np.float32)
    return limits.min, limits.max


def _best(cuts: Cuts, score: Reals) -> np.float32:
    """Return the threshold of the best score, of equal ones the nearest to 0."""
    among = cuts.thresholds[score >= score.max() - _TIE]
    return np.float32(among[np.abs(among).argmin()])


def _best_jointly(by_label: Sequence[Cuts]) -> Logits:
    """Return the thresholds ``[L]`` of the best F1 score of all counts together."""
    positive = sum(cuts.positive for cuts in by_label)
    thresholds = np.zeros(len(by_label), np.float32)
    numerator, denominator = 0, max(positive, 1)
    while positive:  # without any the score is always 0
        true = yes = 0
        for label, cuts in enumerate(by_label):
            gain = 2 * cuts.true * denominator - numerator * cuts.yes
            among = np.flatnonzero(gain == gain.max())
            chosen = among[np.abs(cuts.thresholds[among]).argmin()]
            thresholds[label] = cuts.thresholds[chosen]
            true, yes = true + int(cuts.true[chosen]), yes + int(cuts.yes[chosen])
        better = 2 * true * denominator > numerator * (yes + positive)
        if not better:
            break
        numerator, denominator = 2 * true, yes + positive
    return thresholds


def _ratio(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> Reals:
    """Return a quotient, 0 where the denominator is 0."""
    over = np.asarray(denominator, np.float64)
    return np.divide(numerator, over, out=np.zeros_like(over), where=over > 0)


def _f1(cuts: Cuts) -> Reals:
    """Return the F1 score of yes at each threshold."""
    return _ratio(2 * cuts.true, cuts.yes + cuts.positive)


def _mean_f1_of_two(cuts: Cuts) -> Reals:
    """Return the mean F1 score of yes and no, of those that are labels or answers."""
    no, negative = cuts.total - cuts.yes, cuts.total - cuts.positive
    true_no = negative - (cuts.yes - cuts.true)
    occurring = (cuts.yes + cuts.positive > 0).astype(int) + (no + negative > 0)
    return (_f1(cuts) + _ratio(2 * true_no, no + negative)) / occurring


def _accuracy(cuts: Cuts) -> Reals:
    """Return the share of right answers."""
    right = cuts.true + (cuts.total - cuts.positive) - (cuts.yes - cuts.true)
    return right / cuts.total


def _matthews(cuts: Cuts) -> Reals:
    """Return Matthews' correlation coefficient, 0 where labels or answers are constant."""
    yes, no = cuts.yes.astype(np.float64), (cuts.total - cuts.yes).astype(np.float64)
    positive, negative = float(cuts.positive), float(cuts.total - cuts.positive)
    false = cuts.yes - cuts.true
    covariance = cuts.true * (negative - false) - false * (positive - cuts.true)
    return _ratio(covariance, np.sqrt(yes * positive) * np.sqrt(no * negative))


_OF_COUNTS: Mapping[str, Callable[[Cuts], Reals]] = MappingProxyType(
    {
        "accuracy": _accuracy,
        "f1": _f1,
        "f1_macro": _mean_f1_of_two,
        "f1_micro": _accuracy,  # over both classes a wrong answer is one too many and one missing
        "matthews": _matthews,
    }
)
"""Metrics of yes or no, at each threshold, by name."""


def _mean_f1(cuts: Cuts, scores: Logits, wanted: Bools) -> Reals:
    """Return the mean F1 score of the labels at each threshold of all scores."""
    change = np.zeros(len(cuts.thresholds))
    for own, yes in zip(scores.T, wanted.T, strict=True):
        of_label = _cuts(own, yes)
        score = _f1(of_label)
        change[0] += score[0]
        # It changes where a threshold comes to stand above one of the label's own values.
        change[np.searchsorted(cuts.values, of_label.values) + 1] += np.diff(score)
    return change.cumsum() / scores.shape[1]


def _share_of_right_rows(cuts: Cuts, scores: Logits, wanted: Bools) -> Reals:
    """Return the share of examples whose labels are all right, at each threshold.

    They are where it is at or above all scores of no, and below all of yes.
    """
    highest = np.where(wanted, -np.inf, scores).max(1)
    lowest = np.where(wanted, scores, np.inf).min(1)
    first = np.searchsorted(cuts.values, highest, side="right")
    end = np.searchsorted(cuts.values, lowest) + 1
    possible, size = first < end, len(cuts.thresholds) + 1
    begun, ended = (np.bincount(at[possible], minlength=size) for at in (first, end))
    return (begun - ended).cumsum()[:-1] / len(scores)
