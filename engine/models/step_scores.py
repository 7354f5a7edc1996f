"""Scores of all examples of a step, for heads whose loss compares examples with each other.

Micro-batches go through the model one after the other, and ranks have examples of their own, so
that neither sees the others' examples.  The scores of all of them are computed first, without
gradients, and gathered; then each micro-batch computes the loss of the whole step with its own
scores among the gathered ones.  The gradient of that is exact: the sum of these gradients over all
micro-batches and ranks is the gradient of the step's loss (GradCache, Gao et al. 2021,
arXiv:2101.06983, section 3.2).
"""

from typing import NamedTuple

import torch
from torch import Tensor


class StepScores(NamedTuple):
    """The scores of a task's N examples in a step, as one of its micro-batches sees them.

    Attributes:
        scores: fp32 ``[N, …]``, without gradients.
        ids: int64 ``[N, c]``, of their texts; -1 in rows that stand for no example.
        start: the first of the rows that are the micro-batch's own.
    """

    scores: Tensor
    ids: Tensor
    start: int

    def with_own(self, own: Tensor) -> Tensor:
        """Return the scores of the step, those of the micro-batch ``[n, …]`` with gradients."""
        stop = self.start + len(own)
        return torch.cat([self.scores[: self.start], own, self.scores[stop:]])
