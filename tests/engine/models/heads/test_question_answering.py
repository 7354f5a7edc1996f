"""Spans of contexts: the loss of windows of unequal length, the best span of several windows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.data.batch_shapes import RoundedShapes
from engine.data.collate import pack
from engine.data.loader import TrainingLoader
from engine.data.sampler import TaskSampler
from engine.data.split import TokenizedSplit, tokenize
from engine.data.table import Table
from engine.data.task_batch import AnswerSpans
from engine.data.task_schema import TaskSchema
from engine.data.tokenizer import Tokenizer
from engine.data.windows import Spans
from engine.gradients.balancing import TrainedTasks
from engine.models.heads import best_spans, metrics_for
from engine.models.heads.answer_loss import segment_logsumexp
from engine.models.multitask import MultitaskModel
from engine.runs.scoring import answers, results_of, scores_of
from engine.utils.errors import InputError

from ....device_waits import RecordableOnly
from ...small_models import build_step, one_layer
from .cases import WIDTH, head_of, of_output, states_of, within_twice

FORM = TaskSchema(
    task="squad",
    sentences=("question", "context"),
    label="answers",
    kind="question_answering",
    high=1,
    labels="spans",
    unanswerable=True,
    window_overlap=4,
    max_answer_tokens=5,
)
LENGTHS = (1, 7, 40, 2, 13)
"""Of windows: one of [CLS] alone, a prime, a long one."""


def spans_in(lengths: tuple[int, ...], seed: int = 0) -> AnswerSpans:
    """A random answer in each window; in the first [CLS]."""
    draw = np.random.default_rng(seed)
    ends = np.concatenate(([0], np.cumsum(lengths)))
    pairs = np.sort(draw.integers(0, lengths, (2, len(lengths))), axis=0)
    pairs[:, 0] = 0
    return AnswerSpans(*map(torch.from_numpy, (*(ends[:-1] + pairs), ends)))


def plain_loss(logits: Tensor, labels: AnswerSpans) -> Tensor:
    """The mean of torch's cross entropies, window by window."""
    bounds = labels.offsets.tolist()
    losses = []
    for start, stop, *targets in zip(bounds, bounds[1:], labels.first, labels.last, strict=False):
        own = logits[start:stop].t()
        losses.append(F.cross_entropy(own, torch.stack(targets) - start))
    return torch.stack(losses).mean()


def test_the_scores_are_the_output_layer_on_all_tokens():
    head, tokens = head_of(FORM, "tokens"), torch.randn(6, WIDTH)
    scores = head(states_of(tokens))
    for row, token in zip(scores, tokens, strict=True):
        exact = torch.from_numpy(of_output(head, token.double().numpy()))
        assert within_twice(row, head.output(token), exact)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("padding", [0, 5])
def test_the_loss_is_the_mean_over_windows(scale: float, padding: int):
    head, labels = head_of(FORM, "tokens"), spans_in(LENGTHS)
    torch.manual_seed(1)
    logits = scale * torch.randn(sum(LENGTHS) + padding, 2)
    logits[sum(LENGTHS) :] = 3e38  # of padding, which nothing reads
    exact = plain_loss(logits.double(), labels)
    assert within_twice(head.loss(logits, labels), plain_loss(logits, labels), exact)


def test_the_gradient_is_torchs_and_none_of_padding():
    head, labels = head_of(FORM, "tokens"), spans_in(LENGTHS)
    logits = torch.randn(sum(LENGTHS) + 3, 2, dtype=torch.float64, requires_grad=True)
    (own,) = torch.autograd.grad(head.loss(logits, labels), logits)
    (plain,) = torch.autograd.grad(plain_loss(logits, labels), logits)
    torch.testing.assert_close(own, plain, rtol=1e-12, atol=1e-15)
    assert not own[-3:].any()
    short = spans_in((3, 1, 4))
    small = torch.randn(8, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: head.loss(x, short), small)


def test_the_loss_can_be_recorded_and_waits_for_no_device():
    head, labels = head_of(FORM, "tokens"), spans_in(LENGTHS)
    logits = torch.randn(sum(LENGTHS) + 3, 2, requires_grad=True)
    with RecordableOnly():
        head.loss(logits, labels).backward()
    assert logits.grad.isfinite().all()


def test_sums_of_large_and_small_exponentials():
    offsets = torch.tensor([0, 2, 3])
    x = torch.tensor([[1e4, -1e4], [1e4, -1e4], [-1e4, 0.0]], dtype=torch.float64)
    two = np.log(2)
    expected = torch.tensor([[1e4 + two, -1e4 + two], [-1e4, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(segment_logsumexp(x, offsets), expected, rtol=1e-15, atol=0)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match=r"tasks.squad.head = 'cross': expected tokens"):
        head_of(FORM, "cross")
    with pytest.raises(InputError, match="'mse': a head for question_answering is trained by"):
        head_of(FORM, "tokens", "mse")
    with pytest.raises(ValueError, match="labels: none for task 'squad'"):
        head_of(FORM, "tokens").loss(torch.randn(3, 2), None)


def known(rows: list[int], lengths: tuple[int, ...]) -> tuple[Spans, np.ndarray]:
    """Windows whose tokens from the third to the last but one are two characters each."""
    places = [
        (2 * (token - 2), 2 * (token - 2) + 2) if 2 <= token < length - 1 else (-1, -1)
        for length in lengths
        for token in range(length)
    ]
    nothing = np.zeros(0, np.int64)
    spans = Spans(
        rows=np.array(rows),
        places=np.array(places, np.int32),
        targets=np.zeros((len(rows), 2), np.int64),
        context_of=np.zeros(max(rows) + 1, np.int64),
        context_bytes=np.zeros(0, np.uint8),
        context_offsets=nothing,
        answers=nothing,
        answer_offsets=nothing,
    )
    return spans, np.concatenate(([0], np.cumsum(lengths)))


def best_by_trying(logits, offsets, spans: Spans, most: int, unanswerable: bool):
    """The best span of each question by all pairs of tokens."""
    found = []
    for row in range(spans.num_rows):
        pairs, none = [(-np.inf, (0, 0))], np.inf
        for window in np.flatnonzero(spans.rows == row):
            own = range(offsets[window], offsets[window + 1])
            none = min(none, logits[own[0]].sum())
            inside = [token for token in own if spans.places[token, 1] > 0]
            pairs += [
                (logits[a, 0] + logits[b, 1], (spans.places[a, 0], spans.places[b, 1]))
                for a in inside
                for b in inside
                if a <= b < a + most
            ]
        score, place = max(pairs)
        found.append((0, 0) if unanswerable and none > score else place)
    return np.array(found)


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_the_best_span_is_that_of_all_pairs(most: int, unanswerable: bool):
    rows, lengths = [0, 1, 1, 1, 2, 3], (9, 12, 12, 5, 4, 30)
    spans, offsets = known(rows, lengths)
    empty = 0
    for seed in range(20):
        logits = np.random.default_rng(seed).normal(size=(sum(lengths), 2)).astype(np.float32)
        logits[offsets[:-1]] += seed / 10
        found, certainty = best_spans(logits, offsets, spans, most, unanswerable=unanswerable)
        expected = best_by_trying(logits.astype(np.float64), offsets, spans, most, unanswerable)
        assert found.tolist() == expected.tolist()
        assert ((certainty > 0) & (certainty < 1)).all()
        empty += (found[:, 1] == 0).sum()
    assert bool(empty) == unanswerable


def test_a_context_without_tokens_has_no_answer():
    """As of a blanked row: whatever the task allows."""
    spans, offsets = known([0, 1], (3, 6))
    found, _ = best_spans(np.ones((9, 2), np.float32), offsets, spans, 30, unanswerable=False)
    assert found.tolist() == [[0, 0], [0, 2]]


def test_what_is_not_finite_is_an_answer_to_nothing():
    spans, offsets = known([0, 0, 1], (6, 6, 6))
    logits = np.ones((18, 2), np.float32)
    logits[2] = np.nan
    found, _ = best_spans(logits, offsets, spans, 30, unanswerable=True)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1]).all()


CONTEXTS = [
    " ".join(f"{who} {does} the {what} ." for who in ("ann", "bob", "eve") for what in things)
    for does in ("sees", "hears", "likes")
    for things in (("cat",), ("dog", "sea", "cat"), ("sea", "dog"))
]
QUESTIONS = [f"who {text.split()[1]} it ?" for text in CONTEXTS]


def split_of(form: TaskSchema = FORM, max_length: int = 20) -> TokenizedSplit:
    tokenizer = Tokenizer.train([*CONTEXTS, *QUESTIONS], 80)
    spans = [[(text.index("eve"), text.index("eve") + 3)] for text in CONTEXTS]
    table = Table(
        ids=[f"q{number}" for number in range(len(CONTEXTS))],
        sentences=(QUESTIONS, CONTEXTS),
        labels=np.ones(len(CONTEXTS), np.float32),
        answers=spans,
    )
    return tokenize(form.task, table, tokenizer, max_length, schema=form)


def model_of(dtype: torch.dtype = torch.float32) -> MultitaskModel:
    torch.manual_seed(0)
    config = one_layer(positions=64)
    model = MultitaskModel(config, [FORM], {"squad": "tokens"}, pooling="mean", dropout_p=0.0)
    return model.to(dtype)


def test_micro_batches_and_ranks_give_the_mean_over_the_windows_of_the_step():
    split = split_of()
    assert len(split) > 15
    sampler, model = TaskSampler("squad", len(split), 12, 0), model_of(torch.float64)
    whole = pack([split], [sampler.batch(0)])
    (loss,) = model.losses(model(whole, ["squad"], seed=torch.tensor(0)), whole, ["squad"])
    total = 0.0
    for rank in range(2):
        with TrainingLoader([split], [sampler], 0, 1, micro_batches=2, shard=(rank, 2)) as loader:
            for part in loader:
                (own,) = model.losses(model(part, ["squad"], seed=torch.tensor(0)), part, ["squad"])
                total = total + own * (part.terms[0] / part.step_terms[0])
    assert torch.allclose(total, loss, rtol=1e-12)  # float64, some hundred terms


def test_padding_changes_no_loss():
    split, model = split_of(), model_of(torch.float64)
    chosen = np.array([3, 0, 7])
    found = []
    for shapes in (None, RoundedShapes(64)):
        batch = pack([split], [chosen], 0, shapes)
        (loss,) = model.losses(model(batch, ["squad"], seed=torch.tensor(0)), batch, ["squad"])
        found.append(loss)
    assert batch.padding
    assert torch.allclose(*found, rtol=1e-12)


def test_a_step_of_micro_batches_is_the_step_of_the_whole():
    split = split_of()
    sampler, found = TaskSampler("squad", len(split), 12, 0), []
    for micro_batches in (1, 3):
        step = build_step(
            model_of().train(), trained=TrainedTasks(("squad",), (len(split),)), balance="sum"
        )
        with TrainingLoader([split], [sampler], 0, 1, micro_batches=micro_batches) as loader:
            report = step([*loader], 0, 1e-2)
        found.append((report.losses, step.parameters.rows.clone()))
    (one_loss, one_rows), (loss, rows) = found
    assert torch.allclose(loss, one_loss, rtol=1e-6)
    # Sums of a few hundred fp32 terms in another order.
    assert (rows - one_rows).abs().max() <= 1e-5 * one_rows.abs().max()


def test_answers_are_of_questions_and_stand_in_their_contexts():
    split, model = split_of(), model_of()
    found = answers(model, split)
    assert found.predictions.shape == (len(CONTEXTS), 2)
    assert found.offsets.tolist() == list(range(len(CONTEXTS) + 1))
    logits = scores_of(model, split).double().numpy()
    expected = best_by_trying(logits, split.offsets, split.spans, 5, unanswerable=True)
    assert found.predictions.tolist() == expected.tolist()
    for text, context, (first, end) in zip(
        found.texts.predicted, CONTEXTS, expected.tolist(), strict=True
    ):
        assert text == context[first:end]
    assert found.texts.known == [["eve"]] * len(CONTEXTS)
    squad_f1, exact = metrics_for(FORM)
    right = sum(text == "eve" for text in found.texts.predicted) / len(CONTEXTS)
    assert exact.function(results_of(FORM, found, split.labels)) == pytest.approx(right)
    assert (squad_f1.name, exact.name) == ("squad_f1", "exact_match")


def test_answers_that_are_not_finite_are_refused():
    split, model = split_of(), model_of()
    with torch.no_grad():
        model.head("squad").output.bias[1] = torch.nan
    with pytest.raises(InputError, match="9 of 9 examples of squad: what the model computes is"):
        answers(model, split)


def test_a_model_learns_where_the_answer_is():
    """All windows, a few dozen steps; those without the answer point to [CLS]."""
    split = split_of(replace(FORM, unanswerable=False))
    assert (split.spans.targets == 0).all(1).any()
    sampler = TaskSampler("squad", len(split), 16, 0)
    step = build_step(
        model_of().train(), trained=TrainedTasks(("squad",), (len(split),)), balance="sum"
    )
    with TrainingLoader([split], [sampler], 0, 60) as loader:
        for number, batch in enumerate(loader):
            step(batch, number, 1e-2)
    found = answers(step.model, split)
    assert found.texts.predicted.count("eve") == len(CONTEXTS)
