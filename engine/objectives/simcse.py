"""SimCSE without supervision (Gao et al. 2021, arXiv:2104.08821, equation 4).

Every sentence goes through the encoder twice in one batch.  Dropout draws other masks for the
second copy, and each copy has to be told from those of the other sentences:

    loss_i = -log( exp(cos(u_i, v_i) / t) / sum_j exp(cos(u_i, v_j) / t) )
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.part import Indices, Labels, Part
from ..model.states import TaskStates, at_least_fp32
from .text import NOT_KNOWN, Found


@dataclass(frozen=True, slots=True)
class SentencesTwice:
    """What SimCSE draws its batches from.

    Attributes:
        task: the objective's name.
        sentences: their tokens, [CLS] and [SEP] included.
        found: where they come from.
    """

    task: str
    sentences: Sequence[Indices]
    found: Found = NOT_KNOWN

    def __len__(self) -> int:
        """Return how many sentences there are."""
        return len(self.sentences)

    def part(self, chosen: Indices, _step: int, /) -> Part:
        """Return chosen sentences, all of them once and then all of them again."""
        once = [self.sentences[index] for index in chosen.tolist()]
        return Part(
            task=self.task,
            tokens=np.concatenate(once * 2),
            sizes=np.array([len(sentence) for sentence in once * 2]),
            columns=2,
            labels=None,
        )


class ContrastiveHead(nn.Module):
    """Compares the two copies of each sentence; it has no weights.

    Args:
        temperature: t, what cosines are divided by.
    """

    uses = ()

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
