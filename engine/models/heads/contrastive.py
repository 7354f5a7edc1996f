"""SimCSE without supervision (Gao et al. 2021, arXiv:2104.08821, equation 4).

Every sentence goes through the encoder twice in one batch (engine/data/sentences_twice.py), with
different dropout masks; the loss is that of finding a sentence's second copy among all of them:

    loss_i = -log( exp(cos(u_i, v_i) / t) / sum_j exp(cos(u_i, v_j) / t) )
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.task_batch import Labels
from ..pooling import TaskStates, at_least_fp32
from .base import Head, HeadSettings


class ContrastiveHead(Head):
    """A head without weights that compares the two copies of n sentences."""

    def __init__(self, settings: HeadSettings) -> None:
        super().__init__(settings)
        self.temperature = settings.temperature

    def forward(self, states: TaskStates) -> Tensor:
        """Return the cosine of each first with each second copy, over t, ``[n, n]``."""
        first, second = F.normalize(at_least_fp32(states.pooled), dim=1).chunk(2)
        return first @ second.t() / self.temperature

    def loss(self, scores: Tensor, _labels: Labels | None) -> Tensor:
        """Return the mean cross entropy of finding each sentence's own second copy."""
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))
