"""Retrieval: the vectors of texts, their similarities, and ranks of a split."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.data.task_batch import TextIds
from engine.data.task_schema import FORMATS, TaskSchema
from engine.models.context import Context
from engine.models.heads import SimilaritySettings
from engine.models.heads.similarity_loss import in_batch_loss, triplet_loss
from engine.models.pooling import pool
from engine.models.step_scores import StepScores
from engine.runs.scoring import answers, results_of
from engine.utils.errors import InputError

from ...retrieval_cases import model_of, split_of
from .cases import WIDTH, head_of, states_of

REPLIES = FORMATS["replies"]
TRIPLES = TaskSchema(
    task="triples", sentences=("a", "p", "n"), label="", kind="retrieval", high=1, labels="none"
)


def scores_of(head, examples: int = 4, columns: int = 3):
    """Scores of random states, and the vectors, labels that they are of."""
    pooled = torch.randn(columns * examples, WIDTH)
    labels = TextIds(torch.arange(columns * examples).reshape(examples, columns))
    vectors = pooled.reshape(columns, examples, WIDTH).transpose(0, 1)
    return head(states_of(pooled)._replace(labels=labels)), vectors, labels


def test_scores_are_the_texts_vectors_and_answers_their_similarity():
    scores, vectors, _ = scores_of(head_of(TRIPLES, "cosine"))
    assert torch.equal(scores, F.normalize(vectors, dim=2))
    found = head_of(TRIPLES, "cosine").predict(scores)
    exact = F.cosine_similarity(vectors[:, 0].double(), vectors[:, 1].double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7)
    scores, vectors, _ = scores_of(head_of(TRIPLES, "dot"))
    assert torch.equal(scores, vectors)


@pytest.mark.parametrize(("features", "temperature"), [("cosine", 0.05), ("dot", 1.0)])
def test_the_losses_are_those_of_their_settings(features, temperature):
    for settings, t, symmetric in (
        (SimilaritySettings(), temperature, False),
        (SimilaritySettings(temperature=0.2, symmetric=True), 0.2, True),
    ):
        head = head_of(TRIPLES, features, similarity=settings)
        scores, _, labels = scores_of(head)
        expected = in_batch_loss(scores, labels.ids, t, symmetric=symmetric)
        assert torch.equal(head.loss(scores, labels), expected)
    head = head_of(TRIPLES, features, "triplet", similarity=SimilaritySettings(margin=0.9))
    scores, _, labels = scores_of(head)
    assert torch.equal(head.loss(scores, labels), triplet_loss(scores, 0.9))
    with pytest.raises(ValueError, match="labels: none for task 'triples'"):
        head.loss(scores, None)


def test_the_share_of_a_part_has_the_gradient_of_the_whole():
    head = head_of(TRIPLES, "cosine")
    scores, _, labels = scores_of(head, examples=5)
    whole = scores.double().requires_grad_()
    loss = head.loss(whole, labels)
    loss.backward()
    total = 0.0
    for part in (slice(0, 2), slice(2, 5)):
        own = scores[part].double().requires_grad_()
        of_step = StepScores(scores.double(), labels.ids, part.start)
        share = head.step_loss(own, TextIds(labels.ids[part]), of_step)
        share.backward()
        torch.testing.assert_close(own.grad, whole.grad[part], rtol=1e-12, atol=1e-15)
        total += share.item()
    assert total == pytest.approx(loss.item(), rel=1e-12)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match=r"tasks.replies.loss = 'triplet': needs a negative"):
        head_of(REPLIES, "cosine", "triplet")
    with pytest.raises(InputError, match=r"tasks.replies.head = 'single': expected cosine or dot"):
        head_of(REPLIES, "single")
    with pytest.raises(InputError, match="'mse': a head for retrieval is trained by default or"):
        head_of(REPLIES, "cosine", "mse")
    with pytest.raises(InputError, match=r"tasks.sst.head = 'dot': expected single or bilstm"):
        head_of("sst", "dot")


def test_a_split_is_ranked_by_the_vectors_of_its_texts():
    model, split = model_of(), split_of(30)
    found = answers(model, split)
    x = np.zeros((30, 3, 32))
    for row in range(30):
        alone = split.task_batch(np.array([row]), 0)
        for column, sequence in enumerate(np.split(alone.tokens, np.cumsum(alone.sizes)[:-1])):
            # Equal tokens have equal vectors wherever they stand.
            x[row, column] = _vector(model, sequence)
    similarity = (x[:, 0] * x[:, 1]).sum(1)
    assert np.abs(found.predictions - similarity).max() < 1e-5  # sums of 32 fp32 products
    ranks = []
    for row in range(30):
        similar = x[:, 1:].reshape(-1, 32) @ x[row, 0]
        passages = dict(zip(_keys(split), similar, strict=True))
        own = passages.pop(_keys(split)[2 * row])
        ranks.append(1 + sum(s > own for s in passages.values()))
    assert found.ranking.of_examples.tolist() == ranks
    results = results_of(REPLIES, found, split.labels)
    assert results.ranking is found.ranking


def _vector(model, tokens: np.ndarray) -> np.ndarray:
    class Stream:
        cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
        max_seqlen, attention_plan = len(tokens), None
        position_ids = torch.arange(len(tokens))
        token_type_ids = torch.zeros_like(position_ids)

    with torch.inference_mode():
        hidden = model.encoder(torch.from_numpy(tokens), Context.of(Stream()))
        return F.normalize(pool(hidden, Stream.cu_seqlens, "mean"), dim=1)[0].numpy()


def _keys(split) -> list[tuple[int, ...]]:
    """The tokens of each passage."""
    texts = [tuple(split.tokens[a:b].tolist()) for a, b in pairwise(split.offsets)]
    return [text for number, text in enumerate(texts) if number % 3]
