"""Every head against its formula, written out for one example at a time."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.task_schema import FORMATS
from engine.models.bilstm import BiLstm
from engine.models.features import PAIRS
from engine.models.heads import TaskHead
from engine.models.layers import Embedding, Linear
from engine.models.pooling import SharedLayers, TaskStates

WIDTH, EXAMPLES = 12, 5


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


def states_of(pooled: Tensor, pair: Linear | None = None) -> TaskStates:
    """The states of sequences of one token each, outside training."""
    return TaskStates(
        tokens=pooled,
        pooled=pooled,
        cu_seqlens=torch.arange(len(pooled) + 1, dtype=torch.int32),
        max_seqlen=1,
        labels=None,
        seed=None,
        shared=SharedLayers(Embedding(4, WIDTH), pair),
        row=None,
        num_rows=1,
    )


def head_of(task: str, features: str, loss: str = "default") -> TaskHead:
    head = TaskHead(FORMATS[task], features, WIDTH, dropout_p=0.5, site=0, loss=loss)
    return head.eval()


def of_output(head: TaskHead, vector: np.ndarray) -> float:
    weight, bias = (p.detach().double().numpy() for p in (head.output.weight, head.output.bias))
    return float(weight[0] @ np.atleast_1d(vector) + bias[0])


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
    expected = [of_output(head, u) for u in pooled.double().numpy()]
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
            expected.append(of_output(head, JOINED[features](u, v)))
        elif features == "shared":
            weight, bias = pair.weight.detach().double().numpy(), pair.bias.detach().double()
            hidden = np.maximum(weight @ np.concatenate([u, v]) + bias.numpy(), 0)
            expected.append(of_output(head, hidden))
        elif task == "quora":  # a learnt scale and threshold
            expected.append(of_output(head, SHARES[features](u, v)))
        else:
            expected.append(5 * SHARES[features](u, v))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_a_score_by_cross_entropy_is_a_share_of_its_range():
    head = head_of("sts", "difference", "cross_entropy")
    logits, labels = torch.tensor([-1.0, 0.5, 3.0]), torch.tensor([0.0, 2.2, 5.0])
    p, share = logits.double().sigmoid(), labels.double() / 5
    expected = -(share * p.log() + (1 - share) * (1 - p).log()).mean()
    torch.testing.assert_close(head.loss(logits, labels).double(), expected)
    torch.testing.assert_close(head.predict(logits).double(), 5 * p)


@pytest.mark.parametrize("features", ["difference", "cosine"])
def test_a_score_by_default_has_a_squared_error(features):
    head = head_of("sts", features)
    scores, labels = torch.tensor([-1.0, 2.5, 6.0]), torch.tensor([0.0, 2.0, 5.0])
    assert head.loss(scores, labels) == pytest.approx((1 + 0.25 + 1) / 3)
    assert head.predict(scores).tolist() == [0, 2.5, 5]


def test_classes_and_yes_or_no_have_a_cross_entropy():
    logits = torch.randn(4, 5)
    expected = F.cross_entropy(logits, torch.tensor([0, 4, 2, 1]))
    assert head_of("sst", "single").loss(logits, torch.tensor([0.0, 4, 2, 1])) == expected
    logit = torch.tensor([2.0, -1.0])
    expected = -(logit[0].sigmoid().log() + (1 - logit[1].sigmoid()).log()) / 2
    assert head_of("quora", "concat").loss(logit, torch.tensor([1.0, 0.0])) == pytest.approx(
        expected.item()
    )


def test_a_bilstm_reads_what_follows_cls_from_both_ends():
    """Against torch's bidirectional LSTM over packed sequences, joined with [CLS]."""
    sizes = [4, 9, 2, 6]
    tokens = torch.randn(sum(sizes), WIDTH)
    bounds = np.concatenate([[0], np.cumsum(sizes)])
    head = head_of("sst", "bilstm")
    lstm: BiLstm = head.lstm
    theirs = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True)
    state = lstm.forwards.state_dict()
    state |= {f"{name}_reverse": t for name, t in lstm.backwards.state_dict().items()}
    theirs.load_state_dict(state)

    behind_cls = [tokens[a + 1 : b] for a, b in pairwise(bounds.tolist())]
    packed = nn.utils.rnn.pack_sequence(behind_cls, enforce_sorted=False)
    with torch.no_grad():
        _, (last, _) = theirs(packed)
        cls = tokens[torch.from_numpy(bounds[:-1])]
        joined = head.joint(torch.cat([cls, last[0], last[1]], dim=1)).relu()
        expected = head.output(joined)
        found = head(
            states_of(cls)._replace(
                tokens=tokens,
                cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
                max_seqlen=max(sizes) + 3,
            )
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
