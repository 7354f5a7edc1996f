"""Ranks of passages and their scores against an order that is written out, anchor by anchor."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.models.heads import METRICS, rank_passages

from .cases import WIDTH, results


def ranks_written_out(vectors, ids) -> dict[int, list[int]]:
    """Of each anchor's id the ranks of its relevant passages, ascending."""
    texts = dict(zip(ids.ravel().tolist(), vectors.flatten(0, 1), strict=True))
    passages = {int(text) for row in ids for text in row[1:]}
    found = {}
    for anchor in {int(row[0]) for row in ids}:
        relevant = {int(row[1]) for row in ids if row[0] == anchor}
        others = passages - {anchor} | relevant
        # Of equally similar ones those that are not relevant come first.
        order = sorted(others, key=lambda t: (-float(texts[anchor] @ texts[t]), t in relevant))
        found[anchor] = [place for place, t in enumerate(order, start=1) if t in relevant]
    return found


def scores_written_out(ranks: dict[int, list[int]]) -> dict[str, float]:
    def ndcg(own: list[int]) -> float:
        gain = sum(1 / np.log2(1 + rank) for rank in own if rank <= 10)
        return gain / sum(1 / np.log2(1 + rank) for rank in range(1, min(len(own), 10) + 1))

    def share(own: list[int], k: int) -> float:
        return sum(rank <= k for rank in own) / len(own)

    every = ranks.values()
    return {
        "ndcg@10": np.mean([ndcg(own) for own in every]),
        "mrr@10": np.mean([1 / min(own) if min(own) <= 10 else 0 for own in every]),
        **{f"recall@{k}": np.mean([share(own, k) for own in every]) for k in (1, 10, 100)},
    }


def drawn(texts: int, rows: int, columns: int, seed: int, *, anchors: int | None = None):
    """Rows of random texts whose vectors are whole numbers, so that similarities tie."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, texts, (rows, columns))
    if anchors:
        ids[:, 0] = draw.integers(0, anchors, rows)
    table = torch.from_numpy(draw.integers(-1, 2, (texts, 5))).float()
    return table[torch.from_numpy(ids)], ids


CASES = {
    "one row": (10, 1, 2, None),
    "some texts twice": (40, 30, 2, None),
    "negatives": (300, 60, 4, None),
    "few anchors, many answers": (200, 120, 2, 7),
    "more answers to an anchor than ten": (400, 200, 3, 3),
    "more than a hundred passages": (900, 300, 2, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_ranks_and_scores_are_those_written_out(case, monkeypatch):
    texts, rows, columns, anchors = case
    vectors, ids = drawn(texts, rows, columns, 0, anchors=anchors)
    # Anchors in several portions.
    monkeypatch.setattr("engine.models.heads.ranking._CHUNK", 3 * len(np.unique(ids[:, 1:])))
    ranking, expected = rank_passages(vectors, ids), ranks_written_out(vectors, ids)
    found = {
        int(anchor): ranking.ranks[ranking.anchors == number].tolist()
        for number, anchor in enumerate(np.unique(ids[:, 0]))
    }
    assert found == expected
    for row, rank in zip(ids, ranking.of_examples, strict=True):
        assert rank in expected[int(row[0])]
    given = results([0.0] * rows, [1.0] * rows, ranking=ranking)
    for name, value in scores_written_out(expected).items():
        assert METRICS[name].function(given) == pytest.approx(value, rel=1e-12), name


def test_one_vector_for_all_texts_finds_nothing():
    """Equal similarities would otherwise find the passages that stand first."""
    ids = np.arange(400).reshape(200, 2)
    given = results([0.0], [1.0], ranking=rank_passages(torch.ones(200, 2, WIDTH), ids))
    assert [METRICS[name].function(given) for name in ("ndcg@10", "mrr@10", "recall@100")] == [
        0
    ] * 3


def test_equal_vectors_find_all():
    """As of a model for which an anchor and its passage are the same."""
    table = F.normalize(torch.randn(150, 1, WIDTH), dim=2).expand(-1, 2, -1)
    given = results([0.0], [1.0], ranking=rank_passages(table, np.arange(300).reshape(150, 2)))
    for name in ("ndcg@10", "mrr@10", "recall@1"):
        assert METRICS[name].function(given) == 1
