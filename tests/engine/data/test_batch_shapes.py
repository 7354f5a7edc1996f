"""Few shapes for many batches: every batch fits into one, with little padding."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batch_shapes import RoundedShapes, ShapePlan, merge
from engine.data.collate import pack

from ..small_models import random_split

TASKS = ("sst", "quora", "sts")


@given(
    st.lists(st.lists(st.integers(1, 3000), min_size=2, max_size=2), min_size=1, max_size=40),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=60)
def test_every_batch_is_below_a_row(counts: list[list[int]], limit: int) -> None:
    rows = merge(np.array(counts), limit)
    assert 1 <= len(rows) <= limit
    assert (rows % 32 == 0).all()
    for count in counts:
        assert (np.array(count) < rows).all(axis=1).any()


def test_more_shapes_fill_less() -> None:
    """Three tasks of 32 sentences each, as the real ones are: means 660, 960, 830."""
    rng = np.random.default_rng(0)
    counts = rng.normal((660, 960, 830), (62, 80, 70), (2000, 3)).astype(np.int64)
    shares = []
    for limit in (1, 4, 8, 16):
        plan = ShapePlan({TASKS: counts}, limit, 80)
        assert len(plan) <= limit
        filled = sum(sum(plan.shape(TASKS, row).tokens) for row in counts.tolist())
        shares.append(filled / counts.sum() - 1)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]


def test_sets_of_tasks_share_the_limit() -> None:
    counts = {(task,): np.arange(100, 2000, 7)[:, None] for task in TASKS}
    plan = ShapePlan(counts, 8, 80)
    assert len(plan) == 6
    assert plan.shape(("sst",), [90]).tokens == min(
        plan.shape(("sst",), [size]).tokens for size in range(100, 2000, 7)
    )


def test_a_batch_beyond_the_plan_gets_a_shape_of_its_own() -> None:
    plan = ShapePlan({TASKS: np.array([[10, 10, 10]])}, 4, 80)
    assert plan.shape(TASKS, [9, 9, 9]).tokens == (32, 32, 32)
    assert plan.shape(TASKS, [10, 10, 64]).tokens == (32, 32, 96)
    assert plan.shape(("cfimdb",), [5]).tokens == (32,)


@pytest.fixture
def plan() -> ShapePlan:
    return ShapePlan({TASKS: np.array([[150, 250, 200]])}, 1, 20)


def test_batches_of_one_shape_have_one_signature(plan: ShapePlan) -> None:
    batches = []
    for seed in range(3):
        splits = [random_split(task, 8, vocab=97, seed=seed + n) for n, task in enumerate(TASKS)]
        batches.append(pack(splits, [np.arange(8)] * 3, 0, plan))
    assert len({batch.signature for batch in batches}) == 1
    assert len({batch.num_tokens - batch.padding for batch in batches}) == 3


def test_tokens_are_filled_up_to_multiples() -> None:
    splits = [random_split(task, 8, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    picks = [np.arange(8), np.arange(0), np.arange(8)]  # a rank may have none of a task
    plain, filled = (pack(splits, picks, 0, use) for use in (None, RoundedShapes(32)))
    before, after = (np.diff(batch.token_offsets) for batch in (plain, filled))
    assert after.tolist() == [-(-count // 32) * 32 for count in before.tolist()]
    assert filled.padding == sum(after - before) > 0
    assert filled.max_own_seqlen == plain.max_seqlen
    assert filled.max_seqlen == max(plain.max_seqlen, 31) >= filled.cu_seqlens.diff().max()
    exact = pack(splits, picks, 0, RoundedShapes(1))
    assert exact.signature == plain.signature


def test_padding_is_a_sequence_behind_each_task(plan: ShapePlan) -> None:
    splits = [random_split(task, 8, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    plain, filled = (pack(splits, [np.arange(8)] * 3, 0, use) for use in (None, plan))
    assert filled.token_offsets == (0, 160, 416, 640)
    assert filled.sequences == plain.sequences == (8, 16, 16)
    assert filled.padding == 640 - plain.num_tokens
    assert filled.padded_tokens == plain.padded_tokens
    assert filled.max_seqlen >= filled.cu_seqlens.diff().max()
    assert filled.max_own_seqlen == 20
    for task, own in enumerate(filled.own_sequences()):
        start, stop = filled.token_offsets[task], filled.token_offsets[task + 1]
        begin, end = plain.token_offsets[task], plain.token_offsets[task + 1]
        size = end - begin
        for name in ("input_ids", "position_ids", "token_type_ids"):
            whole = getattr(filled, name)[start:stop]
            assert torch.equal(whole[:size], getattr(plain, name)[begin:end])
            assert not whole[size:].any()
        assert torch.equal(filled.task_cu_seqlens()[task], plain.task_cu_seqlens()[task])
        assert filled.cu_seqlens[own.stop] == start + size
