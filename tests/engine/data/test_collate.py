"""Packing against a loop over examples and tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.data.collate import PackedBatch, pack
from engine.data.split import TokenizedSplit
from kernels import attention_plan


def made_split(columns: int, lengths: list[int], labelled: bool = True) -> TokenizedSplit:
    """A split whose every token tells its place."""
    n = len(lengths) // columns
    offsets = np.concatenate(([0], np.cumsum(lengths[: n * columns])))
    return TokenizedSplit(
        task="made",
        examples=n,
        columns=columns,
        tokens=np.arange(offsets[-1], dtype=np.uint16),
        offsets=offsets,
        labels=np.arange(n, dtype=np.float32) if labelled else None,
        truncated=0,
        bad_rows={},
        blank=(),
    )


def naive(splits: list[TokenizedSplit], picks: list[np.ndarray]) -> dict[str, list[int]]:
    result = {"input_ids": [], "position_ids": [], "cu_seqlens": [0]}
    result |= {"task_offsets": [0], "token_offsets": [0]}
    for split, chosen in zip(splits, picks, strict=True):
        for column in range(split.columns):
            for example in chosen:
                sequence = example * split.columns + column
                tokens = split.tokens[split.offsets[sequence] : split.offsets[sequence + 1]]
                for position, token in enumerate(tokens):
                    result["input_ids"].append(int(token))
                    result["position_ids"].append(position)
                result["cu_seqlens"].append(len(result["input_ids"]))
        result["task_offsets"].append(len(result["cu_seqlens"]) - 1)
        result["token_offsets"].append(len(result["input_ids"]))
    return result


LENGTHS = st.lists(st.integers(2, 9), min_size=2, max_size=12)


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), LENGTHS), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_equals_a_loop(described: list[tuple[int, list[int]]], rng: object) -> None:
    splits = [made_split(columns, lengths) for columns, lengths in described]
    picks = [np.array(rng.choices(range(len(s)), k=rng.randint(1, 5))) for s in splits]
    batch = pack(splits, picks)
    for name, expected in naive(splits, picks).items():
        value = getattr(batch, name)
        assert (value.tolist() if isinstance(value, torch.Tensor) else list(value)) == expected
    assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())
    assert batch.num_tokens == len(batch.input_ids)
    assert batch.examples == tuple(len(chosen) for chosen in picks)
    assert not batch.token_type_ids.any()
    for labels, chosen in zip(batch.labels, picks, strict=True):
        assert labels is not None
        assert labels.tolist() == chosen.tolist()


@pytest.fixture
def batch() -> PackedBatch:
    splits = [made_split(1, [3, 5, 2], labelled=False), made_split(2, [2, 7, 4, 3])]
    return pack(splits, [np.array([2, 0]), np.array([0, 1])])


def test_layout_of_two_sentences(batch: PackedBatch) -> None:
    assert batch.cu_seqlens.diff().tolist() == [2, 3, 2, 4, 7, 3]
    assert batch.task_offsets == (0, 2, 6)
    assert batch.token_offsets == (0, 5, 21)
    assert batch.columns == (1, 2)
    assert batch.labels[0] is None
    assert batch.num_tasks == 2


def test_dtypes(batch: PackedBatch) -> None:
    ids = (batch.input_ids, batch.position_ids, batch.token_type_ids)
    assert {tensor.dtype for tensor in ids} == {torch.int64}
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.labels[1] is not None
    assert batch.labels[1].dtype == torch.float32


def test_statistics(batch: PackedBatch) -> None:
    # Padded: 2 x 3, and 2 x 4 and 2 x 7 for the two columns of the pairs.
    assert batch.padded_tokens == 28
    assert (batch.num_tokens, batch.padding) == (21, 0)


def test_moved_to_another_device(batch: PackedBatch) -> None:
    moved = batch.to("meta")
    tensors = [moved.input_ids, moved.position_ids, moved.token_type_ids, moved.cu_seqlens]
    assert all(tensor.is_meta for tensor in [*tensors, moved.labels[1]])
    assert moved.labels[0] is None
    assert moved.task_offsets == batch.task_offsets


def test_a_plan_of_its_sequences(batch: PackedBatch) -> None:
    """What is made once for a GPU, of a shape that the batch's decides."""
    assert batch.attention_plan is None
    planned = batch.planned()
    expected = attention_plan(batch.cu_seqlens, batch.num_tokens)
    assert planned.attention_plan is not None
    assert all(map(torch.equal, planned.attention_plan, expected))
    assert planned.planned() is planned
    assert len(planned.tensors) == len(batch.tensors) + 2
    moved = planned.to("meta")
    assert moved.attention_plan is not None
    assert all(tensor.is_meta for tensor in moved.attention_plan)

    splits = [made_split(1, [3, 5, 2], labelled=False), made_split(2, [4, 2, 2, 8])]
    other = pack(splits, [np.array([2, 0]), np.array([0, 1])])
    assert other.cu_seqlens.tolist() != batch.cu_seqlens.tolist()
    shapes = [tuple(t.shape for t in one.planned().tensors) for one in (batch, other)]
    assert shapes[0] == shapes[1]


@pytest.mark.gpu
def test_pinned_and_copied(batch: PackedBatch) -> None:
    pinned = batch.pin_memory()
    assert pinned.input_ids.is_pinned()
    assert torch.equal(pinned.to("cuda").input_ids.cpu(), batch.input_ids)


def test_wrong_picks() -> None:
    split = made_split(1, [2, 3])
    with pytest.raises(ValueError, match="no example of made"):
        pack([split], [np.array([], dtype=np.int64)])
    with pytest.raises(ValueError, match="one for each split"):
        pack([split], [])
    with pytest.raises(ValueError, match="one for each split"):
        pack([], [])
