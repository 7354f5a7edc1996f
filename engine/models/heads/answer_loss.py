"""Loss of an answer: its first and last token, each found among all tokens of a window.

With logits s and e of the tokens of window i, and its answer from token a_i to token b_i (Devlin et
al. 2019, arXiv:1810.04805, section 4.2):

    loss_i = -1/2 ( log softmax(s)[a_i] + log softmax(e)[b_i] )

Windows differ in length, and stand in one stream without padding between them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.task_batch import AnswerSpans


def answer_loss(logits: Tensor, labels: AnswerSpans) -> Tensor:
    """Return the mean loss of n windows, 0-dim.

    Args:
        logits: fp32 or float64 ``[T, 2]``, of each token to begin and to end the answer; those
            behind the last window are padding.
        labels: of the windows.
    """
    normalizers = segment_logsumexp(logits, labels.offsets)
    chosen = torch.stack([logits[labels.first, 0], logits[labels.last, 1]], dim=1)
    return (normalizers - chosen).mean()


def segment_logsumexp(x: Tensor, offsets: Tensor) -> Tensor:
    """Return ``log sum exp`` of each column over the rows of each segment, ``[n, C]``.

    Args:
        x: fp32 or float64 ``[T, C]``.
        offsets: int64 ``[n + 1]`` from 0, of n segments, none of them empty; rows behind the last
            are of none.
    """
    # The library wants all rows in segments: those of none make one more.
    offsets = F.pad(offsets, (0, 1), value=len(x))
    numbers = torch.arange(len(x), device=x.device)
    segment = torch.searchsorted(offsets[1:], numbers, right=True)
    largest = torch.segment_reduce(x.detach(), "max", offsets=offsets, axis=0)
    sums = torch.segment_reduce((x - largest[segment]).exp(), "sum", offsets=offsets, axis=0)
    return sums[:-1].log() + largest[:-1]
