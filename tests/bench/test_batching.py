"""Ways to take the sentences of a step: all compute the losses and gradients of the padded loop."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from bench import batching
from bench.baselines import HuggingFaceLoop, PaddedBatch
from tests.bench.test_transformers import varlen_attention

WAYS = [
    batching.SortedParts,
    batching.SortedRow,
    batching.SortedRowOfEachTask,
    batching.NestedRow,
    batching.VarlenRow,
]
# Of each task, of each column, the tokens of its sentences.
LENGTHS = {
    "one sentence a column": [[[1]], [[7], [2]], [[3], [60]]],
    "all of one length": [[[9] * 4], [[9] * 3] * 2, [[9] * 5] * 2],
    # In no order; lengths with one sentence and with several.
    "1 to 60": [
        [[7 * i % 60 + 1 for i in range(60)]],
        [[11 * i % 60 + 1 for i in range(30)], [13 * i % 60 + 1 for i in range(30, 60)]],
        [[17 * i % 60 + 1 for i in range(30)], [19 * i % 60 + 1 for i in range(30, 60)]],
    ],
    "fewer sentences than parts": [[[5]], [[6], [4]], [[5], [3]]],
}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}


def batch(lengths: list[list[list[int]]]) -> PaddedBatch:
    """Return random sentences and labels."""
    torch.manual_seed(1)
    examples = [len(columns[0]) for columns in lengths]
    every = [length for columns in lengths for column in columns for length in column]
    sst, quora, sts = examples
    packed = SimpleNamespace(
        input_ids=torch.randint(1, 50, (sum(every),)),
        cu_seqlens=torch.tensor([0, *itertools.accumulate(every)]),
        columns=[len(columns) for columns in lengths],
        task_offsets=[0, sst, sst + 2 * quora],
        examples=examples,
        labels=[torch.randint(0, 5, (sst,)), torch.rand(quora).round(), 5 * torch.rand(sts)],
    )
    return PaddedBatch(packed, torch.device("cpu"))


def first_step(
    way: type[batching.Batching], given: PaddedBatch, *, kind: str = "bert", balance: str = "sum"
) -> tuple[Tensor, Tensor]:
    """Return float64 losses ``[K]`` and gradient ``[P]``, without dropout in the encoder."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    window = {"local_attention": 16, "pad_token_id": 0}  # of ModernBERT, which drops nothing
    config = {"model_type": kind, **SIZES, **(dropout if kind == "bert" else window)}
    torch.manual_seed(0)
    random.seed(0)  # of published PCGrad
    options = {"autocast": False, "device": torch.device("cpu"), "config": config}
    loop = HuggingFaceLoop(None, balance=balance, batching=way, **options)
    loop.encoder.double()
    loop.heads.double()
    torch.manual_seed(0)  # of the dropout before the heads
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "float", Tensor.double)
        losses = loop.step(given)
    return losses, torch.cat([p.grad.flatten() for p in loop.parameters])


def assert_all_agree(
    ways: list[type[batching.Batching]], lengths: list[list[list[int]]], **options: str
) -> None:
    """In float64, whose rounding is far below what a wrong mask, place or divisor would change."""
    given = batch(lengths)
    expected = first_step(batching.PaddedColumns, given, **options)
    assert all(values.abs().max() > 0.01 for values in expected)
    for way in ways:
        found = first_step(way, given, **options)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_losses_and_gradients_of_the_padded_loop(
    lengths: list[list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attention)
    assert_all_agree(WAYS, lengths)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_gradients_after_published_pcgrad(lengths: list[list[list[int]]]) -> None:
    assert_all_agree([batching.SortedRowOfEachTask], lengths, balance="pcgrad")


def test_sentences_longer_than_modernberts_window() -> None:
    ways = [batching.SortedParts, batching.SortedRow, batching.SortedRowOfEachTask]
    assert_all_agree(ways, LENGTHS["1 to 60"], kind="modernbert")


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_hold_all_sentences_in_order(parts: int) -> None:
    sentences = [[0] * length for length in (3, 1, 2, 1, 7)]
    found = batching.sorted_parts(sentences, parts)
    assert [index for part in found for index in part] == [1, 3, 2, 0, 4]
    assert len(found) == min(parts, 5)
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
