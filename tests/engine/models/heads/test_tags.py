"""A tag for each word: which states are read, the loss of those that count, what is unseen."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from engine.data.collate import pack
from engine.data.loader import TrainingLoader
from engine.data.sampler import TaskSampler
from engine.data.split import TokenizedSplit
from engine.data.task_batch import TaggedTokens
from engine.data.task_schema import TaskSchema
from engine.gradients.balancing import TrainedTasks
from engine.models.multitask import MultitaskModel
from engine.runs.scoring import answers, results_of
from engine.utils.errors import InputError

from ...small_models import build_step, one_layer
from .cases import WIDTH, head_of, of_output, results, states_of, within_twice

CLASSES = ("O", "B-X", "I-X")
TAGS = TaskSchema(
    task="ner",
    sentences=("words",),
    label="tags",
    kind="tags",
    high=2,
    classes=CLASSES,
    labels="words",
    scheme="BIO",
)


def test_the_scores_are_the_output_layer_on_the_words_tokens():
    head, tokens = head_of(TAGS, "tokens"), torch.randn(6, WIDTH)
    labels = TaggedTokens(torch.tensor([4, -1, 0]), torch.tensor([1, -100, 2]))
    scores = head(states_of(tokens)._replace(labels=labels))
    for row, place in enumerate((4, None, 0)):
        vector = np.zeros(WIDTH) if place is None else tokens[place].double().numpy()
        exact = torch.from_numpy(of_output(head, vector))
        assert within_twice(scores[row], head.output(torch.from_numpy(vector).float()), exact)


def test_the_loss_is_the_mean_over_the_tags_that_count():
    head, logits = head_of(TAGS, "tokens"), 3 * torch.randn(5, 3)
    targets = torch.tensor([0, -100, 2, 1, -100])
    exact = -logits.double().log_softmax(1)[[0, 2, 3], [0, 2, 1]].mean()
    plain = F.cross_entropy(logits, targets)
    assert within_twice(head.loss(logits, TaggedTokens(targets, targets)), plain, exact)
    none = torch.full((5,), -100)
    assert head.loss(logits, TaggedTokens(none, none)) == 0
    with pytest.raises(ValueError, match="labels: none for task 'ner'"):
        head.loss(logits, None)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(InputError, match=r"tasks.ner.head = 'single': expected tokens"):
        head_of(TAGS, "single")
    with pytest.raises(InputError, match="'mse': a head for tags is trained by default or"):
        head_of(TAGS, "tokens", "mse")


def split_of(examples: int, seed: int = 0, *, all_pieces: bool = False) -> TokenizedSplit:
    """Random texts of 1 to 5 words of 0 to 3 tokens; one of the first has none."""
    draw = np.random.default_rng(seed)
    counts = draw.integers(1, 6, examples)
    sizes = draw.integers(0, 4, counts.sum()).astype(np.int32)
    sizes[0] = 0
    word_offsets = np.concatenate(([0], np.cumsum(counts)))
    lengths = np.add.reduceat(sizes, word_offsets[:-1]) + 2
    return TokenizedSplit(
        task="ner",
        examples=examples,
        columns=1,
        tokens=draw.integers(1, 90, lengths.sum()).astype(np.int32),
        offsets=np.concatenate(([0], np.cumsum(lengths))),
        labels=draw.integers(0, 3, len(sizes)).astype(np.float32),
        truncated=0,
        bad_rows={},
        blank=(),
        word_offsets=word_offsets,
        word_sizes=sizes,
        all_pieces=all_pieces,
    )


def model_of(dtype: torch.dtype = torch.float32) -> MultitaskModel:
    torch.manual_seed(0)
    config = one_layer()
    model = MultitaskModel(config, [TAGS], {"ner": "tokens"}, pooling="mean", dropout_p=0.0)
    return model.to(dtype)


@pytest.mark.parametrize("all_pieces", [False, True])
def test_micro_batches_and_ranks_give_the_mean_over_the_words_of_the_step(all_pieces: bool):
    """Not the mean of their means: they have other numbers of words."""
    split = split_of(24, all_pieces=all_pieces)
    sampler, model = TaskSampler("ner", 24, 12, 0), model_of(torch.float64)
    whole = pack([split], [sampler.batch(1)])
    (loss,) = model.losses(model(whole, ["ner"], seed=torch.tensor(0)), whole, ["ner"])
    total = 0.0
    for rank in range(2):
        with TrainingLoader([split], [sampler], 1, 2, micro_batches=2, shard=(rank, 2)) as loader:
            for part in loader:
                (own,) = model.losses(model(part, ["ner"], seed=torch.tensor(0)), part, ["ner"])
                total = total + own * (part.terms[0] / part.step_terms[0])
    assert torch.allclose(total, loss, rtol=1e-12)  # float64, some hundred terms


def test_a_step_of_micro_batches_is_the_step_of_the_whole():
    """The step's own weights of micro-batches: the same update within fp32's rounding."""
    split, sampler = split_of(24), TaskSampler("ner", 24, 12, 0)
    found = []
    for micro_batches in (1, 3):
        model = model_of()
        step = build_step(model.train(), trained=TrainedTasks(("ner",), (24,)), balance="sum")
        with TrainingLoader([split], [sampler], 0, 1, micro_batches=micro_batches) as loader:
            report = step([*loader], 0, 1e-2)
        found.append((report.losses, step.parameters.rows.clone()))
    (one_loss, one_rows), (loss, rows) = found
    assert torch.allclose(loss, one_loss, rtol=1e-6)
    # Sums of a few hundred fp32 terms in another order.
    assert (rows - one_rows).abs().max() <= 1e-5 * one_rows.abs().max()


def test_words_that_are_not_seen_are_outside_and_others_in_their_order():
    split, model = split_of(24), model_of()
    found = answers(model, split)
    assert (found.predictions[split.unseen] == 0).all()
    assert len(found.predictions) == split.word_offsets[-1]
    for example in (0, 7, 23):
        alone = pack([split], [np.array([example])])
        (scores,) = model.eval()(alone, ["ner"])
        own = slice(*found.offsets[example : example + 2])
        seen = ~split.unseen[own]
        expected = scores.argmax(1).numpy()
        assert (found.predictions[own][seen] == expected[seen]).all()


def test_entities_are_counted_as_by_hand():
    """Two texts: one entity right, one with a wrong end, one missed; none across texts."""
    entity_f1, accuracy = head_of(TAGS, "tokens").metrics_for(TAGS)[:2]
    labels = [1, 2, 0, 1, 2, 0, 1]
    predictions = [1, 2, 0, 1, 0, 0, 0]
    found = results(predictions, labels, offsets=[0, 5, 7], classes=CLASSES)
    # 3 entities, 2 predicted, 1 right: precision 1/2, recall 1/3.
    assert entity_f1.function(found) == pytest.approx(0.4)
    assert accuracy.function(found) == pytest.approx(5 / 7)
    # B-X at the end of one text and I-X at the beginning of the next are two entities.
    apart = results([1, 2], [1, 2], offsets=[0, 1, 2], classes=CLASSES)
    assert entity_f1.function(apart) == 1
    unseen = results([-1, 2], [1, 2], offsets=[0, 2], classes=CLASSES)
    assert entity_f1.function(unseen) == 0


def test_parts_of_speech_have_no_entities():
    plain = TaskSchema(
        task="pos", sentences=("words",), label="tags", kind="tags", high=2, labels="words"
    )
    names = [metric.name for metric in head_of(plain, "tokens").metrics_for(plain)]
    assert names == ["accuracy", "f1_macro", "f1_micro"]
    split, found = split_of(5), answers(model_of(), split_of(5))
    found = found._replace(predictions=np.where(split.unseen, -1.0, found.predictions))
    metric = head_of(plain, "tokens").metrics_for(plain)[0]
    right = (found.predictions == split.labels).mean()
    assert metric.function(results_of(plain, found, split.labels)) == pytest.approx(right)
