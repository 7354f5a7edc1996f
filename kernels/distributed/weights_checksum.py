"""A checksum of weights, by which the processes that train one model find out that they differ.

It is a function of the bits alone, in integers that wrap around, so that no order of sums and no
device changes it: 0.0 and -0.0 differ, a NaN equals itself.

    words    the bytes of each tensor as int64, 8 bytes a word; what fills no word, an element each
    rows     the sums of every 1,024 words, of the words that remain, and each such element
    checksum the sum over rows of mix(row, its number)

A sum of words reads the weights once and copies nothing: torch sums int64 without a conversion,
where int32 and int16 would become int64 copies of the weights, at 15 times the time.  The mix is
not linear, so that changes in different rows do not cancel.  A change of one element, or of one
row's sum, always changes the checksum; others leave it the same with a probability of about 2^-64,
except where the words of one row add up to what they did (two swapped, or one up and one down).
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..registration.validation import check_data

_ROW = 1024
"""Words of a row: few enough that changes seldom share one, and rows are 1/1024 of the weights."""

_OF_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32}
_WORD = 8

# Odd, and below 2^63 in absolute value: multiplying by them permutes the integers modulo 2^64.
_OF_NUMBER, _FIRST, _SECOND = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB


@torch.no_grad()
def weights_checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return a checksum of the bits of tensors in their order.

    It never waits for the device.  A contiguous tensor is read in place; another one is copied
    while it is read.

    Args:
        tensors: dense, of any dtypes and shapes, on one device.  Of a sharded tensor give the part
            that this process holds.

    Returns:
        0-dim int64, on the tensors' device; 0 on the CPU if there are none.

    Raises:
        TypeError: one is no tensor.
        ValueError: one is sparse or has no data, or they are on several devices.
    """
    rows: list[Tensor] = []
    for number, tensor in enumerate(tensors):
        _check(f"tensors[{number}]", tensor, rows)
        rows.extend(_rows(tensor))
    if not rows:
        return torch.zeros((), dtype=torch.int64)
    return _mixed(torch.cat(rows)).sum()


def _check(name: str, tensor: object, before: list[Tensor]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {tensor.layout}")
    if before and tensor.device != before[0].device:
        raise ValueError(f"{name}: is on {tensor.device}, those before on {before[0].device}")
    check_data(**{name: tensor})


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the rows of one tensor, int64 ``[R]`` each; the second always has one."""
    flat = tensor.detach().contiguous().view(-1)
    of_word = max(1, _WORD // flat.element_size())
    whole = len(flat) // of_word * of_word
    head, tail = flat[:whole], flat[whole:]
    if head.storage_offset() % of_word:  # torch views words at multiples of them only
        head = head.clone()
    words = head.view(torch.int64)
    in_rows = len(words) // _ROW * _ROW
    if in_rows:
        yield words[:in_rows].view(-1, _ROW).sum(1)
    yield words[in_rows:].sum(0, keepdim=True)
    if len(tail):
        yield tail.view(_OF_WIDTH[flat.element_size()]).to(torch.int64)


def _mixed(rows: Tensor) -> Tensor:
    """Return ``[R]``, each row mixed with its number; for each number a permutation."""
    mixed = torch.arange(1, len(rows) + 1, device=rows.device).mul_(_OF_NUMBER).add_(rows)
    for factor, bits in ((_FIRST, 32), (_SECOND, 29)):
        # The mask makes the shift one of unsigned integers.
        mixed ^= (mixed >> bits) & ((1 << (64 - bits)) - 1)
        mixed *= factor
    return mixed
