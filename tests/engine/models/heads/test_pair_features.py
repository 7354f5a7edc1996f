"""Every pair feature against its formula, written out for one example at a time."""

import numpy as np
import pytest
import torch

from engine.models.heads.pair_features import PAIRS
from engine.models.layers import Linear

from .cases import EXAMPLES, WIDTH, head_of, of_output, states_of


def cosine(u: np.ndarray, v: np.ndarray) -> float:
    return u @ v / np.linalg.norm(u) / np.linalg.norm(v)


JOINED = {
    "mean": lambda u, v: (u + v) / 2,
    "concat": lambda u, v: np.concatenate([u, v]),
    "distance": lambda u, v: abs(u - v),
    "difference": lambda u, v: np.concatenate([u, v, abs(u - v)]),
}
SHARES = {
    "cosine": cosine,
    "cosine_shifted": lambda u, v: (cosine(u, v) + 1) / 2,
    "pearson": lambda u, v: 1 / (1 + np.exp(-np.corrcoef(u, v)[0, 1])),
}


def test_all_features_of_pairs_are_tried_here():
    assert {*JOINED, *SHARES, "shared", "cross"} == set(PAIRS)


@pytest.mark.parametrize("task", ["quora", "sts"])
def test_a_pair_in_one_sequence_is_read_like_a_sentence(task):
    pooled = torch.randn(EXAMPLES, WIDTH)
    head = head_of(task, "cross")
    with torch.no_grad():
        found = head(states_of(pooled))
    expected = [of_output(head, u)[0] for u in pooled.double().numpy()]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["quora", "sts"])
@pytest.mark.parametrize("features", [*JOINED, *SHARES, "shared"])
def test_a_pair_is_scored_by_its_formula(task, features):
    pooled, pair = torch.randn(2 * EXAMPLES, WIDTH), Linear(2 * WIDTH, WIDTH, init_std=0.3)
    head = head_of(task, features)
    with torch.no_grad():
        found = head(states_of(pooled, pair))
    rows = pooled.double().numpy()
    expected = []
    for u, v in zip(rows[:EXAMPLES], rows[EXAMPLES:], strict=True):
        if features in JOINED:
            expected.append(of_output(head, JOINED[features](u, v))[0])
        elif features == "shared":
            weight, bias = pair.weight.detach().double().numpy(), pair.bias.detach().double()
            hidden = np.maximum(weight @ np.concatenate([u, v]) + bias.numpy(), 0)
            expected.append(of_output(head, hidden)[0])
        elif task == "quora":  # a learnt scale and threshold
            expected.append(of_output(head, SHARES[features](u, v))[0])
        else:
            expected.append(5 * SHARES[features](u, v))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)
