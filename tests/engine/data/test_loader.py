"""The loaders: same batches as without a thread, nothing lost, nothing left running."""

import threading

import numpy as np
import pytest
import torch

from engine.data.collate import pack
from engine.data.loader import TrainingLoader, evaluation_batches
from engine.data.sampler import Indices, TaskSampler
from engine.data.split import TokenizedSplit


def samplers_of(splits: list[TokenizedSplit], size: int = 8) -> list[TaskSampler]:
    return [TaskSampler(split.task, len(split), size, seed=5) for split in splits]


def test_batches_of_the_steps(splits: list[TokenizedSplit]) -> None:
    samplers = samplers_of(splits)
    with TrainingLoader(splits, samplers, 60, 70) as loader:
        batches = list(loader)
    assert len(batches) == 10
    for step, batch in enumerate(batches, start=60):
        expected = pack(splits, [sampler.batch(step) for sampler in samplers])
        assert torch.equal(batch.input_ids, expected.input_ids)
        assert batch.token_offsets == expected.token_offsets


def test_shards_make_up_the_batch(splits: list[TokenizedSplit]) -> None:
    samplers = samplers_of(splits)
    parts = []
    for rank in range(3):
        with TrainingLoader(splits, samplers, 4, 5, shard=(rank, 3)) as loader:
            parts.extend(loader)
    assert [part.examples for part in parts] == [(3, 3, 2), (3, 2, 3), (2, 3, 3)]
    assert {part.step_terms for part in parts} == {(8, 8, 8)}
    for task, sampler in enumerate(samplers):
        together = torch.cat([part.labels[task] for part in parts])
        whole = splits[task].labels[sampler.batch(4)]
        np.testing.assert_array_equal(np.sort(together.numpy()), np.sort(whole))
    with pytest.raises(ValueError, match="shard"):
        TrainingLoader(splits, samplers, 0, 1, shard=(0, 25))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_batches_of_all_ranks_have_one_shape(
    splits: list[TokenizedSplit], micro_batches: int
) -> None:
    """A step is new on all ranks or on none, and recorded on all or on none."""
    arguments = (splits, samplers_of(splits, 7), 0, 40)
    batches = []
    for rank in range(3):
        settings = {"shapes": 3, "micro_batches": micro_batches, "shard": (rank, 3)}
        with TrainingLoader(*arguments, **settings) as loader:
            batches.append(list(loader))
    for own in zip(*batches, strict=True):
        assert len({(batch.token_offsets, batch.max_seqlen) for batch in own}) == 1
        assert len({batch.num_tokens - batch.padding for batch in own}) > 1 or micro_batches == 2
    signatures = [[batch.signature for batch in own] for own in batches]
    assert len(set(signatures[0])) == (3 if micro_batches == 1 else 2)
    firsts = [[own.index(signature) for signature in own] for own in signatures]
    assert firsts == firsts[:1] * 3


def test_micro_batches_make_up_the_batch(splits: list[TokenizedSplit]) -> None:
    samplers = samplers_of(splits)
    with TrainingLoader(splits, samplers, 4, 6, micro_batches=3) as loader:
        parts = list(loader)
    assert [part.examples for part in parts] == [(3, 3, 3), (3, 3, 3), (2, 2, 2)] * 2
    for task, sampler in enumerate(samplers):
        for step, own in ((4, parts[:3]), (5, parts[3:])):
            together = torch.cat([part.labels[task] for part in own])
            np.testing.assert_array_equal(together, splits[task].labels[sampler.batch(step)])
    with pytest.raises(ValueError, match="3 ranks and 3 micro-batches"):
        TrainingLoader(splits, samplers, 0, 1, shard=(0, 3), micro_batches=3)


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closed_early(splits: list[TokenizedSplit], taken: int) -> None:
    with TrainingLoader(splits, samplers_of(splits), 0, 10**9, depth=2) as loader:
        for _, _ in zip(range(taken), loader, strict=False):
            pass
    assert "packing" not in [thread.name for thread in threading.enumerate()]
    assert list(loader) == []
    loader.close()


def test_closed_after_the_last_batch(splits: list[TokenizedSplit]) -> None:
    loader = TrainingLoader(splits, samplers_of(splits), 3, 3)
    assert list(loader) == []
    assert list(loader) == []
    assert "packing" not in [thread.name for thread in threading.enumerate()]


def test_exceptions_surface(splits: list[TokenizedSplit]) -> None:
    class Broken(TaskSampler):
        def batch(self, step: int) -> Indices:
            if step == 3:
                raise OSError("the disk is gone")
            return super().batch(step)

    samplers = [Broken("sst", len(splits[0]), 8, 0)]
    loader = TrainingLoader(splits[:1], samplers, 0, 9)
    with pytest.raises(OSError, match="the disk is gone"):
        list(loader)
    assert "packing" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("max_tokens", [1, 100, 10**6])
def test_evaluation_takes_every_example_once(splits: list[TokenizedSplit], max_tokens: int) -> None:
    for split in splits:
        batches = list(evaluation_batches(split, max_tokens))
        taken = np.concatenate([indices for indices, _ in batches])
        np.testing.assert_array_equal(np.sort(taken), np.arange(len(split)))
        for indices, batch in batches:
            assert batch.num_tokens <= max_tokens or len(indices) == 1
            np.testing.assert_array_equal(batch.labels[0], split.labels[indices])
        per_example = [batch.num_tokens / len(indices) for indices, batch in batches]
        assert per_example == sorted(per_example, reverse=True)
    if max_tokens == 10**6:
        assert len(batches) == 1


def test_evaluation_batches_are_well_filled(splits: list[TokenizedSplit]) -> None:
    batches = list(evaluation_batches(splits[0], 256))
    longest = int(splits[0].lengths.max())
    assert all(batch.num_tokens > 256 - longest for _, batch in batches[:-1])
