"""Batches of ranks that have examples of their own."""

import numpy as np
import pytest

from engine.data.loader import TrainingLoader
from engine.data.sampler import RankSampler, TaskSampler
from engine.data.split import TokenizedSplit


@pytest.mark.parametrize(("sizes", "batch_size"), [([5, 5], 4), ([3, 8, 1], 7), ([4], 3)])
def test_ranks_draw_from_their_own(sizes: list[int], batch_size: int) -> None:
    sampler = RankSampler("sst", sizes, batch_size, seed=7)
    starts = np.cumsum([0, *sizes])
    assert len(sampler) == starts[-1]
    assert sampler.batches == -(-starts[-1] // batch_size)
    for rank, size in enumerate(sizes):
        drawn = np.concatenate([sampler.batch(step)[rank :: len(sizes)] for step in range(40)])
        assert set(drawn) == set(range(starts[rank], starts[rank + 1]))
        first = drawn[: len(drawn) // size * size].reshape(-1, size)
        assert all(len(set(epoch)) == size for epoch in first)


def test_a_rank_without_a_place_or_an_example() -> None:
    with pytest.raises(ValueError, match="batch_size: expected at least 3"):
        RankSampler("sst", [5, 5, 5], 2, 7)
    with pytest.raises(ValueError, match="no example to draw"):
        RankSampler("sst", [5, 0], 2, 7)


def test_shares_of_a_step_whose_tasks_are_dealt_otherwise(splits: list[TokenizedSplit]) -> None:
    """Each rank gets its own examples, whatever stands before them in the step."""
    dealt, own = splits[:2]
    half = len(own) // 2
    samplers = [
        TaskSampler(dealt.task, len(dealt), 5, seed=1),
        RankSampler(own.task, [half, len(own) - half], 6, seed=1),
    ]
    for rank in range(2):
        with TrainingLoader([dealt, own], samplers, 0, 8, shard=(rank, 2)) as loader:
            for step, batch in enumerate(loader):
                chosen = samplers[1].batch(step)[rank::2]
                assert (chosen < half).all() if rank == 0 else (chosen >= half).all()
                np.testing.assert_array_equal(batch.labels[1], own.labels[chosen])


@pytest.mark.parametrize("chosen", [[], [0], [2, 1, 2]])
def test_sizes_of_sequences_are_those_of_the_batch(
    splits: list[TokenizedSplit], chosen: list[int]
) -> None:
    picked = np.array(chosen, dtype=np.int64)
    for split in splits:
        sizes = split.sequence_sizes(picked, 0)
        np.testing.assert_array_equal(sizes, split.task_batch(picked, 0).sizes)
