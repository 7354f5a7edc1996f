"""The head of SimCSE without supervision (Gao et al. 2021, arXiv:2104.08821, equation 4).

Every sentence goes through the encoder twice in one batch.  Dropout draws other masks for the
second copy, and each copy has to be told from those of the other sentences:

    loss_i = -log( exp(cos(u_i, v_i) / t) / sum_j exp(cos(u_i, v_j) / t) )
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.task_batch import Labels
from .pooling import TaskStates, at_least_fp32


class ContrastiveHead(nn.Module):
    """Compares the two copies of each sentence; it has no weights.

    Args:
        temperature: t, what cosines are divided by.
    """

    decodes_words = False

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, states: TaskStates) -> Tensor:
        """Return the mean loss over the sentences of the batch, 0-dim."""
        first, second = F.normalize(at_least_fp32(states.pooled), dim=1).chunk(2)
        cosines = first @ second.t() / self.temperature
        return F.cross_entropy(cosines, torch.arange(len(first), device=first.device))

    def loss(self, scores: Tensor, _labels: Labels | None) -> Tensor:
        """Return what :meth:`forward` returned."""
        return scores
