"""Rank passages for anchors, and score the ranks: nDCG, MRR, recall.

The passages of a split are all of its texts but the anchors, texts of the same tokens once; an
anchor's relevant ones are those of all examples with that anchor.  The anchor's own text is no
passage for it.  Of equally similar passages those that are not relevant come first, so that a model
that gives all texts one vector finds nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Similarities in memory at a time."""


class Ranking(NamedTuple):
    """Ranks of relevant passages, from 1: A anchors with R relevant passages in all.

    Attributes:
        ranks: int64 ``[R]``, those of an anchor one after the other, ascending.
        anchors: int64 ``[R]``, the anchor of each, 0 to A - 1, ascending.
        of_examples: int64 ``[n]``, the rank of each example's own passage.
    """

    ranks: npt.NDArray[np.int64]
    anchors: npt.NDArray[np.int64]
    of_examples: npt.NDArray[np.int64]


def rank_passages(vectors: Tensor, ids: npt.NDArray[np.int64]) -> Ranking:
    """Rank the passages of a split for each of its anchors, by the dot product of their vectors.

    Args:
        vectors: fp32 ``[n, c, H]``, finite: of anchors, passages that answer them, others.
        ids: int64 ``[n, c]``, the same for texts of the same tokens.
    """
    anchor_ids, first_rows, anchor_of = np.unique(ids[:, 0], return_index=True, return_inverse=True)
    passage_ids, places = np.unique(ids[:, 1:], return_index=True)
    passages = vectors[:, 1:].flatten(0, 1)[torch.from_numpy(places)]
    anchors = vectors[torch.from_numpy(first_rows), 0]
    numbers = np.searchsorted(passage_ids, ids[:, 1])
    pairs, pair_of = np.unique(np.stack([anchor_of, numbers], 1), axis=0, return_inverse=True)
    own = _places_of(passage_ids, anchor_ids)
    ranks = np.empty(len(pairs), dtype=np.int64)
    step = max(1, _CHUNK // len(passage_ids))
    for start in range(0, len(anchors), step):
        first, last = np.searchsorted(pairs[:, 0], [start, start + step])
        rows = torch.from_numpy(pairs[first:last, 0] - start)
        columns = torch.from_numpy(pairs[first:last, 1])
        similarities = anchors[start : start + step] @ passages.t()
        wanted = similarities[rows, columns]
        same = np.flatnonzero(own[start : start + step] >= 0)
        similarities[same, own[start : start + step][same]] = -torch.inf
        similarities[rows, columns] = -torch.inf
        ranks[first:last] = _ranks(similarities, rows, wanted).numpy()
    order = np.lexsort([ranks, pairs[:, 0]])
    return Ranking(ranks[order], pairs[order, 0], ranks[pair_of.reshape(-1)])


def _ranks(similarities: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Return the ranks of passages among those that are not relevant, and among the relevant ones.

    Args:
        similarities: ``[a, P]`` of anchors and passages, -inf of relevant ones.
        rows: ``[r]`` ascending, the anchor of each relevant passage.
        wanted: ``[r]``, how similar it is.
    """
    before = (similarities[rows] >= wanted[:, None]).sum(1)
    # Of one anchor's relevant passages the more similar ones come first.
    order = torch.from_numpy(np.lexsort([-wanted.numpy(), rows.numpy()]))
    starts = torch.searchsorted(rows, rows)
    within = torch.empty_like(order)
    within[order] = torch.arange(len(order)) - starts
    return before + within + 1


def _places_of(ids: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where wanted numbers stand among ascending ones, -1 where they do not."""
    places = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where(ids[places] == wanted, places, -1)


def ndcg(ranking: Ranking, k: int) -> float:
    """Return the mean normalised discounted cumulative gain of the first k passages."""
    from sklearn.metrics import ndcg_score

    counts = np.bincount(ranking.anchors)
    # A column for each of the first k places, and for relevant passages that are behind them.
    gains = np.zeros((len(counts), k + int(counts.max())))
    found = ranking.ranks <= k
    gains[ranking.anchors[found], ranking.ranks[found] - 1] = 1
    missed = counts - np.bincount(ranking.anchors[found], minlength=len(counts))
    gains[:, k:] = np.arange(gains.shape[1] - k) < missed[:, None]
    places = np.broadcast_to(-np.arange(gains.shape[1]), gains.shape)
    return float(ndcg_score(gains, places, k=k, ignore_ties=True))


def reciprocal_rank(ranking: Ranking, k: int) -> float:
    """Return the mean of 1 / rank of the first relevant passage, 0 where that is beyond k."""
    first = np.unique(ranking.anchors, return_index=True)[1]
    ranks = ranking.ranks[first]
    return float(np.where(ranks <= k, 1 / ranks, 0).mean())


def recall(ranking: Ranking, k: int) -> float:
    """Return the mean share of an anchor's relevant passages that are among the first k."""
    counts = np.bincount(ranking.anchors)
    return float((np.bincount(ranking.anchors, ranking.ranks <= k) / counts).mean())


RANKING_METRICS: dict[str, tuple[Callable[[Ranking, int], float], int]] = {
    "ndcg@10": (ndcg, 10),
    "mrr@10": (reciprocal_rank, 10),
    "recall@1": (recall, 1),
    "recall@10": (recall, 10),
    "recall@100": (recall, 100),
}
"""By name, with k."""
