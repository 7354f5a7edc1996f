"""Exponential moving average of the weights, kept on the device.

Averages of the last weights score better than the last ones alone (Polyak and Juditsky 1992).
"""

from torch import Tensor

_WARMUP = 10


class WeightAverage:
    """An average ``a <- a + (1 - d) (w - a)`` of fp32 weights after each step.

    The decay ``d`` of the t-th update is ``min(decay, (1 + t) / (10 + t))``, so that the weights of
    the beginning do not linger in a short run.

    Args:
        master: ``[S]`` fp32, the weights that this process updates.
        decay: from 0 to less than 1.

    Attributes:
        weights: ``[S]`` fp32, the average.
    """

    def __init__(self, master: Tensor, decay: float) -> None:
        self.weights = master.clone()
        self._rate = 1 - decay

    def update(self, master: Tensor, updates: Tensor, skip: Tensor) -> None:
        """Take in the weights of a step; nothing waits for the device.

        Args:
            master: ``[S]`` fp32.
            updates: 0-dim fp32, the steps so far, this one included, that were not skipped.
            skip: 0-dim bool; true leaves the average as it is.
        """
        rate = ((_WARMUP - 1) / (updates + _WARMUP)).clamp(min=self._rate)
        self.weights.lerp_(master, rate.masked_fill(skip, 0.0))
