"""Metrics: functions of predictions and labels."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]


class Metric(NamedTuple):
    """A metric; higher is better.

    Attributes:
        name: as it stands beside a score.
        function: of predictions and labels, float64 ``[n]`` each, all finite, n at least 1.
    """

    name: str
    function: Callable[[Values, Values], float]


def accuracy(predictions: Values, labels: Values) -> float:
    """Return the share of predictions that are their labels."""
    return float((predictions == labels).mean())


def pearson(predictions: Values, labels: Values) -> float:
    """Return the Pearson correlation; 0 where either is constant."""
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(np.corrcoef(predictions, labels)[0, 1])


ACCURACY = Metric("accuracy", accuracy)
PEARSON = Metric("pearson", pearson)
