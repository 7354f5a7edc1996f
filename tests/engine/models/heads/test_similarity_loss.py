"""Losses of similarities against their formulas in float64, one anchor and one text at a time."""

from math import exp, log

import pytest
import torch

from engine.models.heads.similarity_loss import contrastive_loss, in_batch_loss, triplet_loss

from .cases import WIDTH, within_twice


def answers_known(ids: list[list[int]], anchor: int) -> set[int]:
    """The texts that are no negatives of an anchor but its own passage."""
    same = {row[1] for row in ids if row[0] == ids[anchor][0]}
    return {ids[anchor][0], *same}


def written_out(vectors, ids: list[list[int]], t: float, *, symmetric: bool) -> float:
    """The mean loss; texts are compared one by one."""
    x = vectors.double().tolist()
    n, c = len(ids), len(ids[0])

    def power(first: tuple[int, int], second: tuple[int, int]) -> float:
        u, v = (x[row][column] for row, column in (first, second))
        return exp(sum(p * q for p, q in zip(u, v, strict=True)) / t)

    losses = []
    for i in range(n):
        known = answers_known(ids, i)
        own = power((i, 0), (i, 1))
        others = [
            power((i, 0), (j, k))
            for j in range(n)
            for k in range(1, c)
            if (j, k) != (i, 1) and ids[j][k] not in known
        ]
        loss = -log(own / (own + sum(others)))
        if symmetric:
            back = [
                power((j, 0), (i, 1))
                for j in range(n)
                if j != i and ids[i][1] not in answers_known(ids, j)
            ]
            loss = (loss - log(own / (own + sum(back)))) / 2
        losses.append(loss)
    return sum(losses) / n


DISTINCT = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
CASES = {
    "all texts differ": DISTINCT,
    "one example": [[0, 1]],
    "hard negatives": [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)],
    "three negatives": [[5 * i + k for k in range(5)] for i in range(3)],
    "one anchor twice": [[0, 1], [0, 2], [3, 4]],
    "one passage twice": [[0, 1], [2, 1], [3, 4]],
    "an example twice": [[0, 1], [0, 1], [3, 4]],
    "an anchor is another's passage": [[0, 1], [1, 0], [2, 3]],
    "a negative answers another": [[0, 1, 3], [2, 3, 1], [4, 5, 6]],
    "a negative answers its anchor elsewhere": [[0, 1, 2], [0, 2, 1], [3, 4, 1]],
    "a negative is the passage": [[0, 1, 1], [2, 3, 4]],
}


def vectors_of(ids: list[list[int]], scale: float = 1.0) -> torch.Tensor:
    """Unit vectors, equal for equal texts."""
    table = torch.nn.functional.normalize(torch.randn(40, WIDTH), dim=1) * scale
    return table[torch.tensor(ids)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("ids", CASES.values(), ids=CASES.keys())
def test_in_batch_loss_is_its_formula(ids, symmetric):
    vectors, numbers = vectors_of(ids), torch.tensor(ids)
    exact = written_out(vectors, ids, 0.05, symmetric=symmetric)
    double = in_batch_loss(vectors.double(), numbers, 0.05, symmetric=symmetric)
    assert double.item() == pytest.approx(exact, rel=1e-11, abs=1e-13)
    # A sum of at most 15 exponentials: a few roundings of logits of up to 20.
    single = in_batch_loss(vectors, numbers, 0.05, symmetric=symmetric)
    assert single.item() == pytest.approx(exact, rel=1e-5, abs=1e-5)


def test_it_is_cross_entropy_of_scaled_cosines_where_all_texts_differ():
    """The formula of sentence-transformers' MultipleNegativesRankingLoss, scale 20."""
    ids = CASES["hard negatives"]
    x = vectors_of(ids).double()
    passages = torch.cat([x[:, 1], x[:, 2]])
    expected = torch.nn.functional.cross_entropy(20 * x[:, 0] @ passages.t(), torch.arange(4))
    found = in_batch_loss(x, torch.tensor(ids), 1 / 20, symmetric=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_without_an_example_change_nothing(symmetric):
    """As ranks with fewer examples have them: zeros, whose texts have the id -1."""
    ids = torch.tensor(CASES["hard negatives"])
    vectors = vectors_of(CASES["hard negatives"]).double()
    padded = torch.cat([vectors[:1], torch.zeros_like(vectors[:2]), vectors[1:]])
    padded_ids = torch.cat([ids[:1], torch.full_like(ids[:2], -1), ids[1:]])
    for x in (vectors.requires_grad_(), padded.detach().requires_grad_()):
        own = ids if x is vectors else padded_ids
        in_batch_loss(x, own, 0.05, symmetric=symmetric).backward()
        rows = x.grad if x is vectors else x.grad[[0, 3, 4, 5]]
        if x is vectors:
            expected = rows
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-15)
    assert (x.grad[1:3] == 0).all()


def test_large_similarities_stay_finite():
    vectors = vectors_of(DISTINCT, scale=300.0).requires_grad_()
    loss = in_batch_loss(vectors, torch.tensor(DISTINCT), 0.05, symmetric=True)
    loss.backward()
    assert loss.isfinite()
    assert vectors.grad.isfinite().all()


def test_gradients_are_those_of_differences():
    ids = torch.tensor(CASES["a negative answers another"])
    vectors = vectors_of(CASES["a negative answers another"]).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: in_batch_loss(x, ids, 0.1, symmetric=True), (vectors,)
    )


@pytest.mark.parametrize("negatives", [1, 3])
def test_triplet_loss_is_its_formula(negatives):
    vectors = vectors_of([[i * 5 + k for k in range(2 + negatives)] for i in range(8)])
    losses = [
        max(0.0, (0.3 - anchor @ passage + anchor @ other).item())
        for anchor, passage, *others in vectors.double()
        for other in others
    ]
    assert min(losses) == 0 < max(losses), "some are within the margin, some are not"
    exact = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
    plain = (0.3 - (vectors[:, :1] * vectors[:, 1:2]).sum(-1)).add(
        (vectors[:, :1] * vectors[:, 2:]).sum(-1)
    )
    assert within_twice(triplet_loss(vectors, 0.3), plain.relu().mean(), exact)


def test_contrastive_loss_is_its_formula():
    """Pairs within the margin, beyond it, at it, and at the distance 0, of both labels."""
    distances = torch.tensor([0.1, 0.49, 0.5, 1.7, 0.0] * 2)
    labels = torch.tensor([1.0] * 5 + [0.0] * 5)
    terms = [
        (y * d**2 + (1 - y) * max(0.0, 0.5 - d) ** 2) / 2
        for d, y in zip(distances.double().tolist(), labels.tolist(), strict=True)
    ]
    exact = torch.tensor(sum(terms) / 10, dtype=torch.float64)
    assert 0 in terms
    plain = torch.where(labels > 0, distances**2, (0.5 - distances).clamp(min=0) ** 2)
    assert within_twice(contrastive_loss(distances, labels, 0.5), plain.mean() / 2, exact)
