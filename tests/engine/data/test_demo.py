"""The demo corpus: repeatable, whole, and neither trivial nor hopeless."""

from pathlib import Path

import numpy as np
import pytest

from engine.data.demo import SIZES, write_demo
from engine.data.table import Table, read_table
from engine.data.task_schema import ASPECTS, FORMATS


def read(folder: Path, task: str, split: str) -> Table:
    return read_table(FORMATS[task].file(folder, split), FORMATS[task], labelled=split != "test")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_seed_same_bytes(demo: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(demo)
    write_demo(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    assert all(other[name] != content for name, content in contents(demo).items())


@pytest.mark.parametrize("task", FORMATS)
def test_sizes_and_no_leak_between_splits(demo: Path, task: str) -> None:
    seen: set[tuple[str, ...]] = set()
    for split, size in SIZES.items():
        table = read(demo, task, split)
        assert len(table) == size
        examples = set(zip(*table.sentences, strict=True))
        assert len(examples) == size
        assert not seen & examples
        seen |= examples


@pytest.mark.parametrize("task", ["sst", "quora", "cfimdb"])
def test_majority_class_is_a_weak_baseline(demo: Path, task: str) -> None:
    labels = read(demo, task, "dev").labels
    _, counts = np.unique(labels, return_counts=True)
    assert len(counts) == FORMATS[task].high + 1
    assert counts.max() / counts.sum() < 0.65


def test_tags_and_labels_need_the_words_around_them(demo: Path) -> None:
    """Every tag and label occurs, and the words of a slot are no others' alone."""
    slots = read(demo, "slots", "dev")
    assert set(slots.labels) == set(range(len(FORMATS["slots"].classes)))
    assert 0.2 < (slots.labels == 0).mean() < 0.7
    aspects = read(demo, "aspects", "dev").labels
    assert aspects.shape == (SIZES["dev"], len(ASPECTS))
    assert ((aspects.mean(0) > 0.2) & (aspects.mean(0) < 0.7)).all()
    assert 0.1 < (aspects.sum(1) == 0).mean() < 0.4
    assert len(np.unique(aspects, axis=0)) > 20


def test_shared_words_alone_do_not_settle_the_pairs(demo: Path) -> None:
    def share(one: str, two: str) -> float:
        first, second = set(one.split()), set(two.split())
        return len(first & second) / len(first | second)

    def overlap(table: Table) -> np.ndarray:
        return np.array([share(*pair) for pair in zip(*table.sentences, strict=True)])

    sts, quora = read(demo, "sts", "dev"), read(demo, "quora", "dev")
    assert 0.4 < np.corrcoef(overlap(sts), sts.labels)[0, 1] < 0.85
    shared = overlap(quora)
    best = max(((shared > cut) == (quora.labels > 0.5)).mean() for cut in np.unique(shared))
    assert best < 0.85
    questions, replies = read(demo, "replies", "dev").sentences
    nearest = [max(replies, key=lambda reply: share(question, reply)) for question in questions]
    assert np.mean([found == own for found, own in zip(nearest, replies, strict=True)]) < 0.85


def test_vocabulary_and_lengths(demo: Path) -> None:
    words: set[str] = set()
    for task in ("sst", "quora", "sts"):
        for column in read(demo, task, "train").sentences:
            lengths = [len(text.split()) for text in column]
            assert min(lengths) >= 5
            assert max(lengths) <= 18
            words.update(word for text in column for word in text.split())
    assert 150 < len(words) < 400
