"""Examples that are divided among ranks: sizes, terms and labels are those of one split."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config.recipe import load
from engine.data.loader import TrainingLoader
from engine.data.rank_examples import RankExamples
from engine.data.sampler import RankSampler
from engine.data.source import TaskSource
from engine.data.split import TokenizedSplit, tokenize
from engine.data.table import Table, parse_table
from engine.data.tokenizer import Tokenizer
from engine.distributed.ranks import Ranks
from engine.training.rank_sets import _examples

ROWS = [
    f"{'word ' * (1 + number % 5)}{number % 4},{'other ' * (1 + number % 3)}"
    for number in range(11)
]
FIELDS: dict[str, dict[str, Any]] = {
    "pair_classification": {"classes": 2, "text": ("a", "b")},
    "retrieval": {"text": ("a", "b")},
    "token_classification": {"classes": ("x", "y"), "text": ("a",)},
}


class InThreads(Ranks):
    """One of several ranks that are threads of this process."""

    def __init__(self, rank: int, size: int, sent: dict[int, Any], barrier: threading.Barrier):
        super().__init__(rank, size)
        self._sent, self._barrier = sent, barrier

    def _all(self, own: Any) -> list[Any]:
        self._sent[self.rank] = own
        self._barrier.wait()
        found = [self._sent[rank] for rank in range(self.size)]
        self._barrier.wait()
        return found

    def gather_array(self, own):
        return self._all(own)

    def gather(self, numbers):
        return self._all(list(numbers))

    def any(self, flag: bool) -> bool:
        return any(self._all(flag))


def of_all(size: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """Return what each rank makes."""
    sent, barrier, made = dict[int, Any](), threading.Barrier(size), dict[int, Any]()

    def be_a_rank(rank: int) -> None:
        made[rank] = work(InThreads(rank, size, sent, barrier))

    threads = [threading.Thread(target=be_a_rank, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [made[rank] for rank in range(size)]


def source(kind: str) -> TaskSource:
    return TaskSource(kind=kind, files={"train": "f.csv"}, split_by_rank=True, **FIELDS[kind])


def table(kind: str, rows: list[int]) -> Table:
    lines = []
    for number in rows:
        a, b = ROWS[number].split(",")
        tags = " ".join("xy"[at % 2] for at, _ in enumerate(a.split()))
        label = tags if kind == "token_classification" else number % 2
        lines.append(f"{a},{b},{label}\n")
    content = "a,b,label\n" + "".join(lines)
    return parse_table(content.encode(), Path("f.csv"), source(kind).format("t"))


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    return Tokenizer.train(["word other 0 1 2 3"] * 3, 40)


def divided(
    kind: str, words: Tokenizer, limit: int = 0
) -> tuple[TokenizedSplit, list[RankExamples]]:
    """Return a split, and the same examples divided among two ranks."""
    form, head = source(kind).format("t"), {"retrieval": "cosine", "token_classification": "tokens"}
    whole = tokenize("t", table(kind, [*range(11)]), words, 16, schema=form)
    recipe = load(
        "demo",
        [
            "train=['t']",
            f"tasks.t.head={head.get(kind, 'single')}",
            f"max_train_examples={limit}",
            *(["tasks.t.class_weights=balanced"] if kind != "retrieval" else ()),
            f"tasks.t.source.kind={kind}",
            f"tasks.t.source.text={list(FIELDS[kind]['text'])}",
            f"tasks.t.source.classes={FIELDS[kind].get('classes', 2)!r}".replace("(", "[").replace(
                ")", "]"
            )
            if kind != "retrieval"
            else "tasks.t.source.id=''",
            "tasks.t.source.files={train='f.csv',dev='f.csv'}",
        ],
    )

    def work(ranks: Ranks) -> RankExamples:
        rows = [*range(4)] if ranks.rank == 0 else [*range(4, 11)]
        own = tokenize("t", table(kind, rows), words, 16, schema=form)
        return _examples(recipe, own, ranks, 2, plans_shapes=True)

    return whole, of_all(2, work)


@pytest.mark.parametrize("kind", FIELDS)
def test_sizes_terms_and_labels(kind: str, words: Tokenizer) -> None:
    whole, ranks = divided(kind, words)
    chosen = np.array([10, 1, 4, 0, 3])
    for rank, examples in enumerate(ranks):
        assert len(examples) == 11
        assert examples.sizes == (4, 7)
        assert examples.report.rows == 11
        sizes = examples.sequence_sizes(chosen, 0)
        np.testing.assert_array_equal(sizes, whole.sequence_sizes(chosen, 0))
        assert examples.terms(chosen) == whole.terms(chosen)
        if kind != "retrieval":
            counts = whole.label_counts(np.arange(11), 2)
            np.testing.assert_array_equal(examples.class_counts, counts)
        own = chosen[(chosen < 4) == (rank == 0)]
        batch, expected = examples.task_batch(own, 0), whole.task_batch(own, 0)
        np.testing.assert_array_equal(batch.tokens, expected.tokens)
        with pytest.raises(AssertionError, match="examples of other ranks"):
            examples.task_batch(chosen, 0)


def test_a_text_has_one_id_on_all_ranks(words: Tokenizer) -> None:
    whole, ranks = divided("retrieval", words)
    parts = [np.arange(4), np.arange(4, 11)]
    ids = np.concatenate(
        [each.task_batch(part, 0).labels.ids for each, part in zip(ranks, parts, strict=True)]
    )
    known = whole.task_batch(np.arange(11), 0).labels.ids.numpy()
    assert ids.min() >= 0
    one, other = ids.reshape(-1), known.reshape(-1)
    np.testing.assert_array_equal(one[:, None] == one, other[:, None] == other)
    states = np.zeros((len(ranks[0].own.lengths), 3), dtype=np.float32)
    frozen = replace(
        ranks[0].own,
        tokens=np.zeros(len(states), dtype=np.uint16),
        offsets=np.arange(len(states) + 1),
        states=states,
    )
    there = ranks[0].precomputed(frozen)
    np.testing.assert_array_equal(there.task_batch(parts[0], 0).labels.ids, ids[:4])
    np.testing.assert_array_equal(there.sequence_sizes(np.arange(11), 0), np.ones(22))


def test_a_limit_keeps_the_labels_of_each_rank(words: Tokenizer) -> None:
    _, ranks = divided("pair_classification", words, limit=6)
    assert [examples.sizes for examples in ranks] == [(2, 4), (2, 4)]
    assert len(ranks[0]) == 6
    assert ranks[0].class_counts.tolist() == [3, 3]
    for examples, part in zip(ranks, ([0, 1], [2, 3, 4, 5]), strict=True):
        labels = examples.task_batch(np.array(part), 0).labels
        assert sorted(labels.tolist()) == sorted([0.0, 1.0] * (len(part) // 2))


def test_ranks_plan_one_shape_for_a_step(words: Tokenizer) -> None:
    _, ranks = divided("pair_classification", words)
    shapes = []
    for rank, examples in enumerate(ranks):
        sampler = RankSampler("t", examples.sizes, 5, seed=3)
        with TrainingLoader([examples], [sampler], 0, 9, shapes=2, shard=(rank, 2)) as loader:
            shapes.append([(batch.num_tokens, batch.max_seqlen) for batch in loader])
    assert shapes[0] == shapes[1]
    assert len(set(shapes[0])) <= 2
