"""Few shapes for many batches: every batch fits into one, with little padding."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.batch_shapes import PADDING_TOKENS, RoundedShapes, ShapePlan, merge
from engine.data.collate import join, pack, padding_sizes
from engine.data.task_batch import TaskBatch

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
        plan = ShapePlan({TASKS: counts}, limit, [61])
        assert len(plan) <= limit
        filled = sum(sum(plan.shape(TASKS, row, 61).tokens) for row in counts.tolist())
        shares.append(filled / counts.sum() - 1)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0]


def test_sets_of_tasks_share_the_limit() -> None:
    counts = {(task,): np.arange(100, 2000, 7)[:, None] for task in TASKS}
    plan = ShapePlan(counts, 8, [61])
    assert len(plan) == 6
    assert plan.shape(("sst",), [90], 20).tokens == min(
        plan.shape(("sst",), [size], 20).tokens for size in range(100, 2000, 7)
    )


def test_a_batch_beyond_the_plan_gets_a_shape_of_its_own() -> None:
    plan = ShapePlan({TASKS: np.array([[10, 10, 10]])}, 4, [80])
    assert plan.shape(TASKS, [9, 9, 9], 9).tokens == (32, 32, 32)
    assert plan.shape(TASKS, [10, 10, 64], 9).tokens == (32, 32, 96)
    assert plan.shape(("cfimdb",), [5], 5).tokens == (32,)


def test_long_sequences_have_shapes_of_their_own() -> None:
    counts = {TASKS: np.array([[150, 250, 200], [500, 600, 700]])}
    plan = ShapePlan(counts, 5, [30, 95])
    assert len(plan) == 4
    for own in ([140, 240, 190], [490, 600, 700], [900, 1, 1]):  # beyond the plan, too
        shapes = [plan.shape(TASKS, own, longest) for longest in (5, 61, 62, 95, 96)]
        assert [shape.max_seqlen for shape in shapes] == [61, 61, 95, 95, 95]
        assert len({shape._replace(max_seqlen=0) for shape in shapes}) == 1
    all_long = ShapePlan(counts, 5, [62, 95])
    assert len(all_long) == 2
    one_kind = ShapePlan(counts, 1, [30, 95])
    assert len(one_kind) == 1
    assert one_kind.shape(TASKS, [9, 9, 9], 5).max_seqlen == 95
    short = ShapePlan(counts, 2, [30, 50])
    assert len(short) == 2
    assert short.shape(TASKS, [9, 9, 9], 5).max_seqlen == 50


def task_batch(task: str, lengths: list[int]) -> TaskBatch:
    sizes = np.array(lengths, dtype=np.int64)
    tokens = np.ones(sizes.sum(), dtype=np.int64)
    return TaskBatch(task=task, tokens=tokens, sizes=sizes, columns=1, labels=None)


LENGTHS = st.lists(st.integers(1, 90), max_size=12)


@given(
    st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=6),
    st.integers(1, 5),
)
@settings(deadline=None, max_examples=100)
def test_padding_sequences_cover_the_padding(
    steps: list[tuple[list[int], list[int]]], limit: int
) -> None:
    """Of every batch, among them those that the plan does not know."""
    tasks = ("sst", "sts")
    counts = np.array([[sum(lengths) for lengths in step] for step in steps])
    longest = [max([*step[0], *step[1], 1]) for step in steps]
    known = slice(0, (len(steps) + 1) // 2)
    plan = ShapePlan({tasks: counts[known]}, limit, longest[known])
    signatures: dict[tuple[object, ...], set[object]] = {}
    for step, own, most in zip(steps, counts.tolist(), longest, strict=True):
        shape = plan.shape(tasks, own, most)
        batch = join([task_batch(*each) for each in zip(tasks, step, strict=True)], shape)
        for task, lengths in enumerate(step):
            sizes = batch.cu_seqlens.diff()[slice(*batch.task_offsets[task : task + 2])].tolist()
            padding = sizes[len(lengths) :]
            assert sizes[: len(lengths)] == lengths
            assert len(padding) == shape.padding_sequences[task]
            assert sum(sizes) == shape.tokens[task]
            assert max(padding) <= PADDING_TOKENS
            assert padding[-1] > 0
            # Whole ones at places that the shape knows, and empty ones before.
            assert padding == sorted(padding)
            assert all(size == PADDING_TOKENS for size in padding[padding.count(0) + 1 :])
        assert batch.max_own_seqlen == max(shape.max_seqlen, most) >= most
        assert batch.max_seqlen == max(PADDING_TOKENS, batch.max_own_seqlen)
        # Heads are recorded for a number of examples.
        key = (shape, batch.max_own_seqlen, batch.examples)
        signatures.setdefault(key, set()).add(batch.signature)
    assert all(len(found) == 1 for found in signatures.values())
    assert len(set(itertools.chain(*signatures.values()))) == len(signatures)


@pytest.mark.parametrize(
    ("missing", "sequences", "sizes"),
    [
        (1, 3, [0, 0, 1]),
        (32, 3, [0, 0, 32]),
        (33, 3, [0, 1, 32]),
        (96, 3, [32, 32, 32]),
        (31, 1, [31]),
    ],
)
def test_sizes_of_padding(missing: int, sequences: int, sizes: list[int]) -> None:
    assert padding_sizes(missing, sequences).tolist() == sizes


@pytest.fixture
def plan() -> ShapePlan:
    return ShapePlan({TASKS: np.array([[150, 250, 200]])}, 1, [20])


def test_batches_of_one_shape_have_one_signature(plan: ShapePlan) -> None:
    batches = []
    for seed in range(3):
        splits = [random_split(task, 8, vocab=97, seed=seed + n) for n, task in enumerate(TASKS)]
        batches.append(pack(splits, [np.arange(8)] * 3, 0, plan))
    assert len({batch.signature for batch in batches}) == 1
    assert len({batch.num_tokens - batch.padding for batch in batches}) == 3


def test_a_longer_sequence_has_another_signature() -> None:
    """Also one that is shorter than the longest padding: heads are recorded for a length."""
    shape = ShapePlan({TASKS[:1]: np.array([[50]])}, 1, [20]).shape(TASKS[:1], [50], 20)
    batches = [join([task_batch("sst", [10, longest])], shape) for longest in (15, 20, 25, 30, 40)]
    assert [batch.max_seqlen for batch in batches] == [32, 32, 32, 32, 40]
    assert len({batch.signature for batch in batches}) == 4


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


def test_padding_is_cut_behind_each_task(plan: ShapePlan) -> None:
    splits = [random_split(task, 8, vocab=97, seed=n) for n, task in enumerate(TASKS)]
    plain, filled = (pack(splits, [np.arange(8)] * 3, 0, use) for use in (None, plan))
    assert filled.token_offsets == (0, 160, 416, 640)
    assert filled.sequences == plain.sequences == (8, 16, 16)
    assert filled.padding == 640 - plain.num_tokens
    assert filled.padded_tokens == plain.padded_tokens
    assert filled.max_seqlen == PADDING_TOKENS == filled.cu_seqlens.diff().max()
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
        padding = filled.cu_seqlens[own.stop : filled.task_offsets[task + 1] + 1]
        assert len(padding) - 1 == (stop - start) // PADDING_TOKENS
        assert padding[0] == start + size
        assert padding[-1] == stop
