"""Attention's Triton kernels: any lengths, many of them, wrong ones, far apart."""

import pytest
import torch
from torch import Tensor

from kernels.attention import attention_triton
from kernels.attention.attention_options import AttentionOptions

from ..attention_case import AttentionCase, boundaries
from ..attention_lengths import (
    EMPTY,
    FEW_KEYS,
    NO_WINDOW,
    WINDOWS,
    Window,
    assert_structure,
    drawn_pairs,
    reference_by_sequence,
)
from ..conftest import untouched_memory
from ..tolerance import assert_within_twice

# Several sequences in a tile, sequences of several tiles, and nothing at all; one list for both is
# self-attention, which goes by runs.
LENGTHS = {
    "sentences": ([18, 1, 0, 23, 17, 60, 3],) * 2,
    "tiles": ([64, 90, 1],) * 2,
    "cross": ([3, 5, 0, 70, 4], [7, 2, 4, 130, 0]),
    "nothing": ([0, 0],) * 2,
    "no sequence": ([],) * 2,
}


@pytest.mark.parametrize(
    ("causal", "width", "p", "dtype"),
    [
        (False, 32, 0.0, torch.float32),
        (True, 20, 0.2, torch.float32),
        (True, 64, 0.2, torch.float32),
        (False, 96, 0.2, torch.float32),
        (True, 32, 0.2, torch.float16),
        (False, 64, 0.0, torch.float16),
        (True, 128, 0.2, torch.float16),
    ],
)
def test_attention(causal: bool, width: int, p: float, dtype: torch.dtype, device: str) -> None:
    found: list[list[Tensor]] = []
    torchs: list[list[Tensor]] = []
    exact: list[list[Tensor]] = []
    # The largest errors of several draws of all cases: those of a few tokens are a matter of luck.
    # Two are enough of the width whose tiles are small, so that the interpreter takes long.
    for lengths_q, lengths_k in (2 if width == 96 else 3) * list(LENGTHS.values()):
        case = AttentionCase(lengths_q, lengths_k, causal, width, p, dtype, device)
        found.append(case.run())
        torchs.append(case.reference(dtype))
        exact.append(case.reference(torch.float64))
    for results in zip(
        *(zip(*cases, strict=True) for cases in (found, torchs, exact)), strict=True
    ):
        assert_within_twice(*(torch.cat([x.flatten() for x in parts]) for parts in results))


@pytest.mark.parametrize(
    ("causal", "p", "dtype"),
    [
        (True, 0.0, torch.float32),
        (True, 0.2, torch.float16),
        (False, 0.2, torch.float32),
        (False, 0.0, torch.float16),
    ],
)
def test_attention_over_lengths_on_both_sides_of_every_block(
    causal: bool, p: float, dtype: torch.dtype, device: str
) -> None:
    seed = 2 * causal + (p > 0)  # draws other pairs for each case
    pairs = [*FEW_KEYS[3:6], *EMPTY, *drawn_pairs(4, seed)]
    case = AttentionCase(*map(list, zip(*pairs, strict=True)), causal, 32, p, dtype, device)
    found = case.run()
    streams = tuple(x.cpu() for x in (case.q, *case.kv.unbind(1), case.grad_out))
    torchs, exact = (
        reference_by_sequence(pairs, streams, own, causal, p, case.seed.cpu(), 3)
        for own in (dtype, torch.float64)
    )
    assert_structure(pairs, causal, [x.cpu() for x in case.results])
    for tensors in zip([x.cpu() for x in found], torchs, exact, strict=True):
        assert_within_twice(*(x.masked_fill(x.isneginf(), 0) for x in tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_in_windows(dtype: torch.dtype, device: str) -> None:
    """Self-attention by tiles and by runs, with whatever window, in turn causal and with dropout.

    The largest errors of all windows are compared: the gradients of queries that see one key are
    zero, and in 16 bits the difference that they are is not.
    """
    lengths = [130, 1, 66, 0, 5]
    found: list[list[Tensor]] = []
    torchs: list[list[Tensor]] = []
    exact: list[list[Tensor]] = []
    for i, window in enumerate(WINDOWS[::2] + WINDOWS[5:6]):
        causal, p = i % 2 == 0, 0.2 * (i // 2 % 2)
        case = AttentionCase(lengths, lengths, causal, 32, p, dtype, device, window=window)
        found.append(case.run())
        torchs.append(case.reference(dtype))
        exact.append(case.reference(torch.float64))
    for results in zip(
        *(zip(*cases, strict=True) for cases in (found, torchs, exact)), strict=True
    ):
        assert_within_twice(*(torch.cat([x.flatten() for x in parts]) for parts in results))


@pytest.mark.parametrize(
    ("causal", "p", "dtype", "window"),
    [
        (False, 0.0, torch.float32, (3, 5)),
        (True, 0.2, torch.float32, (64, 64)),
        (False, 0.2, torch.float16, (40, 64)),
        (False, 0.2, torch.float32, (-1, 2)),
    ],
)
def test_windows_of_queries_and_keys_of_unlike_lengths(
    causal: bool, p: float, dtype: torch.dtype, window: Window, device: str
) -> None:
    pairs = [(5, 130), (66, 131), (131, 66), (65, 65), *EMPTY]
    lengths = map(list, zip(*pairs, strict=True))
    case = AttentionCase(*lengths, causal, 32, p, dtype, device, window=window)
    found = case.run()
    streams = tuple(x.cpu() for x in (case.q, *case.kv.unbind(1), case.grad_out))
    torchs, exact = (
        reference_by_sequence(pairs, streams, own, causal, p, case.seed.cpu(), 3, window)
        for own in (dtype, torch.float64)
    )
    assert_structure(pairs, causal, [x.cpu() for x in case.results], window)
    for tensors in zip([x.cpu() for x in found], torchs, exact, strict=True):
        assert_within_twice(*(x.masked_fill(x.isneginf(), 0) for x in tensors))


@pytest.mark.parametrize(
    ("with_plan", "dtype"), [(True, torch.float32), (True, torch.float16), (False, torch.float32)]
)
def test_tiles_outside_of_a_window_are_not_visited(
    with_plan: bool, dtype: torch.dtype, device: str
) -> None:
    """A zero probability times NaN is NaN, so that what is near alone was multiplied.

    Tiles of 64 and the window of (64, 64), of one pass and of the other, reach 192 tokens.
    """
    cu_seqlens = boundaries([580], device)
    options = (cu_seqlens, cu_seqlens if with_plan else cu_seqlens.clone())
    options += (AttentionOptions(0.2, window_left=64, window_right=64),)
    qkv = torch.randn(580, 3, 1, 32, device=device).to(dtype)
    grad_out = torch.randn_like(qkv[:, 0])
    results = []
    for value in (0.0, torch.nan):
        qkv[320:324, 2] = value
        out, lse = attention_triton.forward(*qkv.unbind(1), *options)
        grad = torch.full_like(qkv, torch.nan)
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(grad_out, *inputs, *options, grads=grad.unbind(1))
        results.append((out, grad))
    for one, other in zip(*results, strict=True):
        assert other[256].isnan().any()  # by a tile that they share
        for far in (slice(128), slice(516, None)):
            assert torch.equal(one[far], other[far])


def test_attention_with_more_sequences_than_a_grid_has_rows(device: str) -> None:
    lengths = [0] * 70_000
    lengths[123], lengths[-1] = 5, 9
    qkv = torch.randn(14, 3, 1, 32, device=device)
    few, many = (
        attention_triton.forward(*qkv.unbind(1), cu, cu, AttentionOptions(0.2))
        for cu in (boundaries([5, 9], device), boundaries(lengths, device))
    )
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("window", [NO_WINDOW, (2, 9)])
@pytest.mark.parametrize("wrong", [[0, 3, 12], [-4, 3, 8]])
def test_attention_stays_inside_its_tensors(wrong: list[int], window: Window, device: str) -> None:
    """Wrong boundaries, which a GPU does not look at unless asked to, reach no other memory."""
    qkv = torch.full((20, 3, 1, 32), torch.nan, device=device)[6:14]
    qkv.normal_()
    results = []
    for numbers in ([0, 3, 8], wrong):
        cu = torch.tensor(numbers, dtype=torch.int32, device=device)
        options = (cu, cu, AttentionOptions(0.2, False, 0.0, 0, *window))
        out, lse = attention_triton.forward(*qkv.unbind(1), *options)
        grad = torch.empty_like(qkv)
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(torch.ones_like(out), *inputs, *options, grads=grad.unbind(1))
        results.append((out, lse, grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_attention_with_offsets_beyond_32_bits(device: str) -> None:
    """Rows 2^28 elements apart; the memory between them is never touched."""
    row, cu_seqlens = 2**28, boundaries([5, 6], device)
    near = torch.randn(11, 3, 1, 32, device=device).half()
    with untouched_memory():
        far = torch.empty(11 * row, dtype=torch.float16, device=device)
    far = far.as_strided((11, 3, 1, 32), (row, 32, 32, 1)).copy_(near)
    options = (cu_seqlens, cu_seqlens, AttentionOptions(0.2))
    results = []
    for qkv in (near, far):
        out, lse = attention_triton.forward(*qkv.unbind(1), *options)
        grads = [torch.empty_like(near[:, 0]) for _ in range(3)]
        inputs = (*qkv.unbind(1), out, lse)
        attention_triton.backward(torch.ones_like(out), *inputs, *options, grads=tuple(grads))
        results.append([out, lse, *grads])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
