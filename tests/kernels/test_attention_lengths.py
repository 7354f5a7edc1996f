"""Attention over queries and keys of unlike lengths, with scratch and outputs full of NaN."""

from functools import cache

import pytest
import torch
from torch import Tensor

from kernels import flash_attn_varlen_func

from .attention_lengths import (
    EMPTY,
    FEW_KEYS,
    NO_WINDOW,
    WINDOW_PAIRS,
    WINDOWS,
    Pair,
    Window,
    assert_structure,
    boundaries,
    drawn_pairs,
    fill_rows_that_meet_none,
    reference_by_sequence,
)
from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED, RNG_OFFSET = torch.tensor(-77), 3
HEADS, WIDTH, TAIL = 6, 32, 3
# Each a batch; the pairs that are drawn differ from one to the next.
CASES = [(dtype, causal, p) for dtype in DTYPES for causal in (True, False) for p in (0.0, 0.3)]
# Every window with every dtype, in turn causal, with dropout, both and neither.
WINDOW_CASES = [
    (dtype, (i + j) % 2 == 0, 0.3 * ((i + j) // 2 % 2), window)
    for i, window in enumerate(WINDOWS)
    for j, dtype in enumerate(DTYPES)
]


class Batch:
    """Sequences of given lengths, and what float64 and torch in the same dtype make of them."""

    def __init__(
        self,
        pairs: list[Pair],
        dtype: torch.dtype,
        causal: bool,
        p: float,
        window: Window = NO_WINDOW,
    ) -> None:
        self.pairs, self.causal, self.p, self.window = pairs, causal, p, window
        self.lengths = tuple(list(lengths) for lengths in zip(*pairs, strict=True))
        generator = torch.Generator().manual_seed(len(pairs))
        totals = [sum(self.lengths[i]) + TAIL for i in (0, 1, 1, 0)]
        self.streams = tuple(
            torch.randn(total, HEADS, WIDTH, generator=generator).to(dtype) for total in totals
        )
        self.fill_rows_that_meet_none(torch.nan)  # they are not read
        self.dtype = dtype

    def fill_rows_that_meet_none(self, value: float) -> None:
        fill_rows_that_meet_none(self.pairs, self.causal, self.streams, value, self.window)

    def assert_structure(self, results: list[Tensor]) -> None:
        assert_structure(self.pairs, self.causal, results, self.window)

    def reference(self, dtype: torch.dtype) -> list[Tensor]:
        return reference_by_sequence(
            *(self.pairs, self.streams, dtype, self.causal, self.p, SEED, RNG_OFFSET),
            window=self.window,
        )

    def run(self) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in self.streams[:3]]
        out, lse, _ = flash_attn_varlen_func(
            *leaves,
            *map(boundaries, self.lengths),
            *map(max, self.lengths),
            self.p,
            causal=self.causal,
            window_size=self.window,
            return_attn_probs=True,
            seed=SEED,
            rng_offset=RNG_OFFSET,
        )
        grads = torch.autograd.grad(out, leaves, self.streams[3])
        return [out.detach(), lse, *grads]


@cache
def batch_and_references(case: int) -> tuple[Batch, list[Tensor], list[Tensor]]:
    dtype, causal, p = CASES[case]
    batch = Batch([*FEW_KEYS, *EMPTY, *drawn_pairs(12, seed=case)], dtype, causal, p)
    return batch, batch.reference(dtype), batch.reference(torch.float64)


@cache
def windowed_batch_and_references(case: int) -> tuple[Batch, list[Tensor], list[Tensor]]:
    dtype, causal, p, window = WINDOW_CASES[case]
    pairs = [*WINDOW_PAIRS, *drawn_pairs(3, seed=case)]
    batch = Batch(pairs, dtype, causal, p, window)
    return batch, batch.reference(dtype), batch.reference(torch.float64)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("case", range(len(CASES)), ids=[str(case) for case in CASES])
def test_lengths_on_both_sides_of_every_block(case: int) -> None:
    batch, torchs, exact = batch_and_references(case)
    found = batch.run()
    batch.assert_structure(found)
    for tensors in zip(found, torchs, exact, strict=True):
        assert_within_twice(*(x.masked_fill(x.isneginf(), 0) for x in tensors))


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("case", range(len(WINDOW_CASES)), ids=[str(case) for case in WINDOW_CASES])
def test_windows(case: int) -> None:
    batch, torchs, exact = windowed_batch_and_references(case)
    found = batch.run()
    batch.assert_structure(found)
    for tensors in zip(found, torchs, exact, strict=True):
        assert_within_twice(*(x.masked_fill(x.isneginf(), 0) for x in tensors))


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False])
def test_one_sequence_alone_in_fresh_scratch(causal: bool, p: float) -> None:
    """No sequence before it has left anything in the scratch that would be near enough."""
    results = []
    for pair in [*FEW_KEYS, *EMPTY, *drawn_pairs(12, seed=99)]:
        batch = Batch([pair], torch.float32, causal, p)
        found = batch.run()
        batch.assert_structure(found)
        results.append((found, batch.reference(torch.float32), batch.reference(torch.float64)))
    for of_all in zip(*(zip(*result, strict=True) for result in results), strict=True):
        tensors = (torch.cat([x.flatten() for x in parts]) for parts in zip(*of_all, strict=True))
        assert_within_twice(*(x.masked_fill(x.isneginf(), 0) for x in tensors))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("window", [NO_WINDOW, (5, 3)])
@pytest.mark.parametrize("causal", [True, False])
def test_no_value_of_rows_that_meet_none_counts(
    causal: bool, window: Window, dtype: torch.dtype, value: float
) -> None:
    pairs = [*FEW_KEYS, *EMPTY, (0, 7), (9, 9), (3, 300)]
    batch = Batch(pairs, dtype, causal, 0.3, window)
    results = []
    for own in (0.0, value):
        batch.fill_rows_that_meet_none(own)
        results.append(batch.run())
    batch.assert_structure(results[1])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_poison_reaches_outputs_and_scratch() -> None:
    """What the tests of this file rest on: scratch is torch's memory, as outputs are."""
    assert torch.empty(1000).isnan().all()
    assert torch.empty(1000).new_empty(7, dtype=torch.float16).isnan().all()
    q, cu_seqlens = torch.randn(8, 1, 16), boundaries([8])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 8, 8)
    allocations = [event.count for event in profile.key_averages() if event.key == "aten::empty"]
    assert allocations == [3]  # output, log-sum-exp, scratch
