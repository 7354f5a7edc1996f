"""Losses of similarities: in-batch negatives and triplets of retrieval, pairs with labels.

Example i is an anchor a_i, a passage p_i that answers it and any number of passages n_ik that do
not; s is the similarity of two vectors.  The default loss is that of finding the own passage among
all passages of a step, of any example (Henderson et al. 2017, arXiv:1705.00652, section 4.4;
``MultipleNegativesRankingLoss`` of sentence-transformers):

    loss_i = -log( exp(s(a_i, p_i) / t) / sum_x exp(s(a_i, x) / t) ),    x any p_j or n_jk

``symmetric`` takes the mean of it and of the loss of finding the anchor of p_i among all anchors.
A text is no negative where it is known to be an answer: one of the same tokens as the anchor or its
passage, or as the passage of another example with the same anchor.

The loss ``triplet`` compares an example's passage with its own negatives alone (Schroff et al.
2015, arXiv:1503.03832, equation 3, of similarities in place of distances):

    loss_i = mean_k max(0, margin - s(a_i, p_i) + s(a_i, n_ik))

The loss ``contrastive`` of pairs with the label y, 1 for the same and 0 for different ones, pulls
same ones together and pushes different ones apart up to the margin (Hadsell et al. 2006, equation
4; ``ContrastiveLoss`` of sentence-transformers), with the distance d = 1 - s:

    loss_i = ( y_i d_i^2 + (1 - y_i) max(0, margin - d_i)^2 ) / 2
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class SimilaritySettings(NamedTuple):
    """Settings of a loss that compares similarities.

    Attributes:
        temperature: t, that similarities are divided by; 0 for the default of the features.
        symmetric: whether passages look for their anchors, too.
        margin: of the losses ``triplet`` and ``contrastive``.
    """

    temperature: float = 0.0
    symmetric: bool = False
    margin: float = 0.5


IN_BATCH = SimilaritySettings()
"""Those of in-batch negatives as sentence-transformers has them."""


def in_batch_loss(vectors: Tensor, ids: Tensor, temperature: float, *, symmetric: bool) -> Tensor:
    """Return the mean loss of finding each anchor's passage among those of all examples, 0-dim.

    Args:
        vectors: fp32 or float64 ``[N, c, H]``: anchors, their passages, their negatives.
        ids: int64 ``[N, c]``, equal for equal texts; -1 in rows that stand for no example.
        temperature: that similarities are divided by.
        symmetric: take the mean with the loss of finding each passage's anchor.
    """
    passages, passage_ids = vectors[:, 1:].transpose(0, 1).flatten(0, 1), ids[:, 1:].t().flatten()
    anchor_ids, positive_ids = ids[:, :1], ids[:, 1:2]
    own = torch.eye(len(ids), len(passage_ids), dtype=torch.bool, device=ids.device)
    # How many examples with an anchor have a text as their passage: counts of up to 2^24 are exact.
    of_anchor = (anchor_ids == anchor_ids.t()).float()
    known = of_anchor @ (positive_ids == passage_ids).float() > 0
    known |= passage_ids == anchor_ids
    is_example = anchor_ids.squeeze(1) >= 0
    excluded = (known | (passage_ids < 0) | ~is_example[:, None]) & ~own
    logits = vectors[:, 0] @ passages.t() / temperature
    logits = logits.masked_fill(excluded, -torch.inf)
    losses = _of_diagonal(logits)
    if symmetric:
        losses = (losses + _of_diagonal(logits[:, : len(ids)].t())) / 2
    return losses.where(is_example, 0).sum() / is_example.sum()


def _of_diagonal(logits: Tensor) -> Tensor:
    """Return the cross entropy ``[N]`` of finding i in row i."""
    return F.cross_entropy(
        logits, torch.arange(len(logits), device=logits.device), reduction="none"
    )


def triplet_loss(vectors: Tensor, margin: float) -> Tensor:
    """Return the mean loss of n triplets or more, 0-dim.

    Args:
        vectors: fp32 or float64 ``[n, c, H]``, c of 3 or more.
        margin: by which an answer is to be more similar than a negative.
    """
    similarities = (vectors[:, :1] * vectors[:, 1:]).sum(-1)
    return (margin - similarities[:, :1] + similarities[:, 1:]).relu().mean()


def contrastive_loss(distances: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Return the mean loss of n pairs, 0-dim.

    Args:
        distances: fp32 or float64 ``[n]``.
        labels: of the same dtype ``[n]``, 1 for the same and 0 for different ones.
        margin: the distance beyond which different ones are far enough apart.
    """
    apart = (margin - distances).relu()
    return (labels * distances.square() + (1 - labels) * apart.square()).mean() / 2
