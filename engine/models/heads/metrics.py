"""Metrics, by the names that ``tasks.NAME.metrics`` of a recipe gives them.

scikit-learn, scipy and seqeval compute all but those that need no library to be imported: shares of
right answers, words in common, reciprocal ranks, and numpy's correlation.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...data.tags import OUTSIDE
from .answer_metrics import AnswerTexts, is_exact, mean_of, word_f1
from .ranking import RANKING_METRICS, Ranking

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The answers of a model on a labelled split, for a metric.

    Attributes:
        predictions: float64 ``[N]``, class numbers or values; of several labels ``[N, L]``, 0 or 1.
        labels: the same of the data.
        probabilities: float64 ``[N, C]`` of C classes, ``[N, L]`` of each of L labels; None of a
            head without probabilities.
        offsets: int64 ``[n + 1]``; answers ``offsets[i]:offsets[i + 1]`` are of example i.
        classes: the names of the classes, empty where they have none.
        ranking: of the passages, for retrieval.
        texts: of question answering, whose predictions are spans.
    """

    predictions: Values
    labels: Values
    probabilities: Values | None
    offsets: npt.NDArray[np.int64]
    classes: tuple[str, ...] = ()
    ranking: Ranking | None = None
    texts: AnswerTexts | None = None


class Metric(NamedTuple):
    """A metric.

    Attributes:
        name: as it stands beside a score.
        function: of results, all finite, with N at least 1.
        sign: 1 where higher is better, -1 where lower is, as of an error.
    """

    name: str
    function: Callable[[Results], float]
    sign: int = 1


def accuracy(results: Results) -> float:
    """Return the share of right answers; of several labels, of examples with all of them right."""
    right = results.predictions == results.labels
    return float(right.reshape(len(right), -1).all(1).mean())


def pearson(results: Results) -> float:
    """Return the Pearson correlation; 0 where either is constant."""
    predictions, labels = results.predictions, results.labels
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


def _spearman(results: Results) -> float:
    """Return Spearman's rank correlation; 0 where either is constant."""
    from scipy.stats import spearmanr

    predictions, labels = results.predictions, results.labels
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(spearmanr(predictions, labels).statistic)


def _mean_squared_error(results: Results) -> float:
    from sklearn.metrics import mean_squared_error

    return float(mean_squared_error(results.labels, results.predictions))


def _matthews(results: Results) -> float:
    """Return Matthews' correlation coefficient; 0 where either is constant."""
    from sklearn.metrics import matthews_corrcoef

    if np.ptp(results.predictions) == 0 or np.ptp(results.labels) == 0:
        return 0.0
    return float(matthews_corrcoef(results.labels, results.predictions))


def _f1(average: str) -> Callable[[Results], float]:
    """Return the F1 score; 0 for a class that is neither predicted nor a label."""

    def f1(results: Results) -> float:
        from sklearn.metrics import f1_score

        labels, predictions = results.labels.astype(int), results.predictions.astype(int)
        return float(f1_score(labels, predictions, average=average, zero_division=0.0))

    return f1


def _average_precision(results: Results) -> float:
    """Return the area under the precision-recall curve, the mean over classes or labels.

    A class without an example has none, and is left out.
    """
    from sklearn.metrics import average_precision_score

    assert results.probabilities is not None, "the head has probabilities"
    probabilities, labels = results.probabilities, results.labels
    if labels.ndim == 1 and probabilities.shape[1] == 2:
        labels, probabilities = labels[:, None], probabilities[:, 1:]
    elif labels.ndim == 1:
        labels = (labels[:, None] == np.arange(probabilities.shape[1])).astype(float)
    known = labels.any(0)
    if not known.any():
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return float(average_precision_score(labels[:, known], probabilities[:, known]))


def _entity_f1(results: Results) -> float:
    """Return the F1 score of whole entities, as seqeval and CoNLL's script count them."""
    from seqeval.metrics import f1_score

    def by_text(numbers: Values) -> list[list[str]]:
        names = [results.classes[int(number)] if number >= 0 else OUTSIDE for number in numbers]
        return [names[start:stop] for start, stop in pairwise(results.offsets.tolist())]

    labels, predictions = by_text(results.labels), by_text(results.predictions)
    return float(f1_score(labels, predictions, zero_division=0))


def _of_ranks(score: Callable[[Ranking, int], float], k: int) -> Callable[[Results], float]:
    def ranked(results: Results) -> float:
        assert results.ranking is not None, "the head ranks passages"
        return score(results.ranking, k)

    return ranked


def _of_texts(score: Callable[[str, str], float]) -> Callable[[Results], float]:
    def scored(results: Results) -> float:
        assert results.texts is not None, "the head answers by texts"
        return mean_of(score, results.texts)

    return scored


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("accuracy", accuracy),
            Metric("f1", _f1("binary")),
            Metric("f1_micro", _f1("micro")),
            Metric("f1_macro", _f1("macro")),
            Metric("matthews", _matthews),
            Metric("average_precision", _average_precision),
            Metric("entity_f1", _entity_f1),
            Metric("pearson", pearson),
            Metric("spearman", _spearman),
            Metric("mse", _mean_squared_error, sign=-1),
            Metric("squad_f1", _of_texts(word_f1)),
            Metric("exact_match", _of_texts(is_exact)),
            *(Metric(name, _of_ranks(*each)) for name, each in RANKING_METRICS.items()),
        )
    }
)
"""By name."""
