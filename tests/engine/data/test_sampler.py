"""The examples of each batch: every one once an epoch, as a function of seed and step."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data import sampler
from engine.data.sampler import TaskSampler, stratified_subset
from engine.utils.rng import Numbers, compact_permutation


@given(n=st.integers(1, 50), size=st.integers(1, 20), seed=st.integers(0, 2**63 - 1))
def test_every_example_once_an_epoch(n: int, size: int, seed: int) -> None:
    sampler = TaskSampler("sst", n, size, seed)
    steps = 3 * n  # a whole number of epochs: size of them times three
    drawn = np.concatenate([sampler.batch(step) for step in range(steps)])
    assert drawn.shape == (steps * size,)
    epochs = drawn.reshape(-1, n)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(n), (len(epochs), 1)))


def test_resuming_needs_only_the_step() -> None:
    whole = TaskSampler("quora", 1000, 32, seed=7)
    before = [whole.batch(step) for step in range(100)]
    resumed = TaskSampler("quora", 1000, 32, seed=7)
    for step in (99, 31, 32, 0):  # in any order, across the ends of epochs
        np.testing.assert_array_equal(resumed.batch(step), before[step])


def test_orders_differ_by_seed_task_and_epoch() -> None:
    first = TaskSampler("sst", 64, 64, seed=0)
    others = [
        first.batch(1),
        TaskSampler("sts", 64, 64, seed=0).batch(0),
        TaskSampler("sst", 64, 64, seed=1).batch(0),
    ]
    assert not any(np.array_equal(first.batch(0), other) for other in others)


def test_the_order_stays_the_same_for_ever() -> None:
    # Fixed once: a change here means that old runs no longer resume into the same batches.
    order = TaskSampler("sst", 10, 10, seed=0).batch(0)
    np.testing.assert_array_equal(order, [1, 3, 4, 5, 2, 6, 0, 8, 7, 9])


@pytest.mark.parametrize("kind", ["task", "tokens"])
def test_the_orders_of_two_epochs_are_kept(monkeypatch, kind: str) -> None:
    """A run of many epochs holds no more of them, and a batch across two computes none again."""
    drawn = []

    def permuted(count: int, *names: object) -> Numbers:
        drawn.append(names[-1])
        return compact_permutation(count, *names)

    monkeypatch.setattr(sampler, "compact_permutation", permuted)
    if kind == "task":
        batches: sampler.Sampler = sampler.TaskSampler("t", 10, 4, seed=0)
    else:
        batches = sampler.TokenSampler("t", np.full(10, 3), 12, seed=0)
    for step in range(10):
        for _ in range(2):  # of micro-batches, or of ranks
            batches.batch(step)
    assert drawn == [0, 1, 2, 3]
    batches.batch(0)
    assert drawn[4:] == [0]  # it was not held


def test_orders_are_uniform() -> None:
    # Each of 6 places gets each of 6 examples equally often: chi-square with 25 degrees of
    # freedom exceeds 52.6 once in a thousand seeds, and this seed is fixed.
    counts = np.zeros((6, 6))
    for step in range(6000):
        counts[np.arange(6), TaskSampler("sst", 6, 6, seed=3).batch(step)] += 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 52.6


def test_subset_is_drawn_from() -> None:
    subset = np.array([3, 14, 15, 92])
    sampler = TaskSampler("sst", 100, 8, 0, subset)
    assert len(sampler) == 4
    np.testing.assert_array_equal(np.sort(sampler.batch(5)), np.repeat(subset, 2))


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match="num_examples"):
        TaskSampler("sst", 0, 8, 0)
    with pytest.raises(ValueError, match="batch_size"):
        TaskSampler("sst", 8, 0, 0)


@given(
    labels=st.lists(st.integers(0, 50), min_size=1, max_size=200),
    limit=st.integers(1, 250),
    seed=st.integers(0, 1000),
)
def test_subset_keeps_the_distribution(labels: list[int], limit: int, seed: int) -> None:
    scores = np.array(labels, dtype=np.float32) / 10
    chosen = stratified_subset(scores, limit, "sts", seed)
    assert len(chosen) == min(limit, len(scores))
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, stratified_subset(scores, limit, "sts", seed))
    rounded = np.floor(scores + 0.5).astype(int)
    whole, part = np.bincount(rounded, minlength=6), np.bincount(rounded[chosen], minlength=6)
    assert (np.abs(part - whole * len(chosen) / len(scores)) < 1).all()


def test_subsets_differ_by_seed() -> None:
    labels = np.zeros(1000, dtype=np.float32)
    one, other = (stratified_subset(labels, 500, "sst", seed) for seed in (0, 1))
    assert 200 < len(np.intersect1d(one, other)) < 300
