"""Rotary embedding's Triton kernel."""

import pytest
import torch

from kernels.rotary import rotary_triton
from kernels.rotary.rotary import positions_reference, rotary_reference
from kernels.rotary.rotary_embedding import rotary_tables

from ..tolerance import assert_within_twice

POSITIONS = 40
# Width and rotary width: all, a part, one pair, no power of two, an odd width.
WIDTHS = [(64, 64), (64, 32), (16, 2), (80, 80), (31, 30)]


def rotate(x: torch.Tensor, place: tuple, interleaved: bool, conjugate: bool, half: int) -> None:
    """Compare both forms of the launcher with the reference, in place on two groups of three."""
    cos, sin = (table.to(x.device) for table in rotary_tables(POSITIONS, 2 * half))
    options = (interleaved, conjugate)
    positions = positions_reference(x.device, *x.shape[:2], *place)
    positions = torch.where(positions < POSITIONS, positions, -1)
    exact = rotary_reference(x.double(), cos.double(), sin.double(), positions, *options)
    torchs = rotary_reference(x, cos, sin, positions, *options)
    out = torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    rotary_triton.rotate(x, out, x.shape[2], cos, sin, *place, *options)
    assert_within_twice(out, torchs, exact)
    before = x.clone()
    rotary_triton.rotate(x, x, 2, cos, sin, *place, *options)
    assert torch.equal(x[:, :, :2], out[:, :, :2])
    assert torch.equal(x[:, :, 2:], before[:, :, 2:])
    assert torch.equal(x[positions < 0], before[positions < 0])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_width"), WIDTHS)
def test_position_ids(width: int, rotary_width: int, interleaved: bool, device: str) -> None:
    for tokens in (1, 37):
        ids = torch.randint(0, POSITIONS, (tokens,), device=device)
        x = torch.randn(1, tokens, 3, 5, width, device=device)
        rotate(x, (ids, None, None, 0), interleaved, False, rotary_width // 2)
        rotate(x, (ids.int(), None, None, 0), interleaved, True, rotary_width // 2)


def test_packed_sequences(device: str) -> None:
    """Empty sequences, rows behind the last one, offsets."""
    cu_seqlens = torch.tensor([0, 0, 17, 17, 30], dtype=torch.int32, device=device)
    offsets = torch.tensor([3, 1, 90, 20], device=device)
    for offset, each in ((0, None), (5, None), (0, offsets), (0, offsets.int())):
        x = torch.randn(1, 37, 3, 2, 16, device=device)
        rotate(x, (None, cu_seqlens, each, offset), False, False, 8)
    none = cu_seqlens[:1]
    rotate(torch.randn(1, 5, 3, 2, 16, device=device), (None, none, None, 0), True, False, 8)


def test_batch(device: str) -> None:
    offsets = torch.tensor([3, 0], device=device)
    for offset, each in ((0, None), (2, None), (0, offsets)):
        x = torch.randn(2, 13, 3, 2, 16, device=device)
        rotate(x, (None, None, each, offset), False, False, 8)


def test_views(device: str) -> None:
    """Strides of tokens, groups and heads of a larger tensor; columns behind are not touched."""
    wide = torch.randn(1, 50, 3, 4, 24, device=device)
    before, view = wide.clone(), wide[:, 3:40:2, :, 1:3, :16]
    ids = torch.arange(view.shape[1], device=device)
    rotate(view, (ids, None, None, 0), False, False, 4)
    view.copy_(before[:, 3:40:2, :, 1:3, :16])
    assert torch.equal(wide, before)


def test_positions_outside_of_the_tables_change_nothing(device: str) -> None:
    """Nothing is read there: the host must not look."""
    ids = torch.tensor([0, -1, POSITIONS, 2**40, -(2**40), 39], device=device)
    x = torch.randn(1, 6, 3, 2, 16, device=device)
    ids_inside = torch.where((ids >= 0) & (ids < POSITIONS), ids, -1)
    cos, sin = (table.to(device) for table in rotary_tables(POSITIONS, 16))
    expected = rotary_reference(x, cos, sin, ids_inside[None])
    rotary_triton.rotate(x, x, 3, cos, sin, ids, None, None, 0, False, False)
    torch.testing.assert_close(x, expected)
    assert torch.equal(x[0, 1:5], expected[0, 1:5])
