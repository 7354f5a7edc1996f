"""A checksum of weights: every change of a bit, an element or an order shows, and nothing else."""

import struct

import pytest
import torch
from torch import Tensor

from kernels.distributed.weights_checksum import weights_checksum

from ..device_waits import RecordableOnly, no_wait_for_the_device

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHAPES = ((), (0,), (1,), (3,), (5, 7), (2, 3, 4), (1024, 4), (2053, 3))
ROW = 1024
MASK = (1 << 64) - 1


def checksum(*tensors: Tensor) -> int:
    return int(weights_checksum(tensors))


def by_hand(*tensors: Tensor) -> int:
    """The definition, in Python's integers."""
    rows: list[int] = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        content = bytes(flat.view(torch.uint8).tolist())
        words = [word for (word,) in struct.iter_unpack("<q", content[: len(content) // 8 * 8])]
        whole = len(words) // ROW * ROW
        rows += [sum(words[start : start + ROW]) for start in range(0, whole, ROW)]
        rows.append(sum(words[whole:]))
        form = {1: "<b", 2: "<h", 4: "<i", 8: "<q"}[flat.element_size()]
        rows += [element for (element,) in struct.iter_unpack(form, content[8 * len(words) :])]
    total = 0
    for number, row in enumerate(rows, 1):
        mixed = number * 0x1E3779B97F4A7C15 + row & MASK
        mixed = (mixed ^ mixed >> 32) * 0x3F58476D1CE4E5B9 & MASK
        total += (mixed ^ mixed >> 29) * 0x14D049BB133111EB
    return (total + (1 << 63)) % (1 << 64) - (1 << 63)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_the_definition(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
    result = weights_checksum(tensors)
    assert result.dtype == torch.int64
    assert result.shape == ()
    assert int(result) == by_hand(*tensors)
    for tensor in tensors:
        assert checksum(tensor) == by_hand(tensor)


def test_other_dtypes_and_several_at_once() -> None:
    tensors = [
        torch.arange(-9, 9, dtype=torch.int8),
        torch.tensor([True, False, True]),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.randn(3, dtype=torch.complex64),
        torch.arange(4),
        torch.randn(3).bfloat16(),
    ]
    assert checksum(*tensors) == by_hand(*tensors)
    assert checksum() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 3, 4, 17, 4099, 9000])
def test_every_bit_counts(dtype: torch.dtype, numel: int) -> None:
    weights = torch.randn(numel).to(dtype)
    before = checksum(weights)
    of_width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weights.element_size()]
    bits = weights.view(of_width)
    for place in {0, numel // 2, numel - 1}:
        for bit in range(8 * weights.element_size()):
            last = bit == 8 * weights.element_size() - 1
            flip = -(1 << bit) if last else 1 << bit
            bits[place] ^= flip
            assert checksum(weights) != before, (place, bit)
            bits[place] ^= flip
    assert checksum(weights) == before


def test_small_drift_does_not_cancel() -> None:
    """Plain sums of the bits are equal where as many elements went up as down by one bit."""
    weights = torch.randn(100_000)
    drifted = weights.clone()
    bits = drifted.view(torch.int32)
    chosen = torch.randperm(len(bits))[:64]
    bits[chosen[:32]] += 1
    bits[chosen[32:]] -= 1
    assert weights.view(torch.int32).sum() == bits.sum()
    assert checksum(weights) != checksum(drifted)


def test_the_order_counts() -> None:
    first, second, empty = torch.randn(40), torch.randn(40), torch.zeros(0)
    assert checksum(first, second) != checksum(second, first)
    assert checksum(first, second) != checksum(torch.cat([first, second]))
    assert checksum(first, empty) != checksum(empty, first)
    rows = torch.randn(4, 2 * ROW)
    assert checksum(rows) != checksum(rows.flip(0))


def test_equal_bits_are_equal() -> None:
    weights = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.0])
    assert checksum(weights) == checksum(weights.clone())
    assert checksum(torch.zeros(3)) != checksum(-torch.zeros(3))
    other_nan = weights.clone()
    other_nan.view(torch.int32)[0] ^= 1
    assert other_nan[0].isnan()
    assert checksum(weights) != checksum(other_nan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_elements_count(dtype: torch.dtype) -> None:
    """Strides, an offset into the storage, parameters and views give what a plain copy gives."""
    matrix = torch.randn(37, 129).to(dtype)
    expected = checksum(matrix)
    assert checksum(matrix.T.contiguous().T) == expected
    assert checksum(torch.cat([matrix, matrix], 1)[:, :129]) == expected
    assert checksum(matrix.flip(0).flip(0)) == expected
    assert checksum(torch.nn.Parameter(matrix)) == expected
    for offset in range(1, 5):
        moved = torch.zeros(offset + matrix.numel(), dtype=dtype)[offset:].view(37, 129)
        assert checksum(moved.copy_(matrix)) == expected
    assert checksum(torch.randn(1).to(dtype).expand(3000)) != 0


def test_nothing_is_read_back_or_copied() -> None:
    weights = [torch.randn(3, 4096), torch.randn(5).bfloat16(), torch.zeros(0)]
    with RecordableOnly() as recorded:
        weights_checksum(weights)
    copies = {"aten.clone.default", "aten.copy_.default"}
    assert not copies & set(recorded.calls)
    # The element of bf16 that fills no word.
    assert recorded.calls.count("aten._to_copy.default") == 1


def test_it_takes_no_gradient() -> None:
    weights = torch.randn(4, requires_grad=True)
    assert not weights_checksum([weights]).requires_grad


def test_refusals() -> None:
    weights = torch.randn(4)
    with pytest.raises(TypeError, match=r"tensors\[1\]: expected a tensor, got list"):
        weights_checksum([weights, [1.0]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"tensors\[0\]: expected a dense tensor"):
        weights_checksum([weights.to_sparse()])
    with pytest.raises(ValueError, match=r"tensors\[1\]: is on meta, those before on cpu"):
        weights_checksum([weights, torch.empty(3, device="meta")])
    freed = torch.randn(4)
    freed.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"tensors\[0\]: its storage holds 0 of 16 bytes"):
        weights_checksum([freed])


@pytest.mark.gpu
def test_devices_agree_and_nothing_waits() -> None:
    for dtype in DTYPES:
        tensors = [torch.randn(shape).to(dtype) for shape in SHAPES]
        on_gpu = [tensor.cuda() for tensor in tensors]
        with no_wait_for_the_device():
            result = weights_checksum(on_gpu)
        assert int(result) == checksum(*tensors)
