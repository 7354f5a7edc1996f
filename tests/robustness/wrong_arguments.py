"""Values that are wrong for an argument, and tensors that end where a forbidden page begins."""

import ctypes
import mmap
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_INTS = [-1, 0, 1, 2, 3, 7, 1000, 2**31 - 1, 2**31, 2**62, -(2**31), -(2**63)]
_FLOATS = [-1.0, 0.0, 1.0, 1.5, 1e-45, 1e300, float("nan"), float("inf"), -float("inf")]
_LISTS = [
    [],
    [0],
    [0, 0],
    [0, 5],
    [5, 0],
    [0, 5, 20, 20],
    [0, -1, 20],
    [-5, 0, 5],
    [0, 2**40],
    [0, 24],
]
_DTYPES = [
    *(torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8),
    *(torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn),
]
_PAGE = mmap.PAGESIZE


def corrupted(value: Any, draw: random.Random) -> tuple[Any, str]:
    """Return a value of about the same kind that is wrong, and what is wrong with it."""
    if isinstance(value, Tensor):
        return _corrupted_tensor(value, draw)
    if value is None:
        value = torch.zeros(draw.choice([(), (0,), (1,), (32,), (3, 3)]))
        return value, f"{list(value.shape)} for none"
    choices = {bool: [True, False, 2], int: _INTS, float: _FLOATS}.get(type(value), _LISTS)
    wrong = draw.choice([*choices, None] if draw.random() < 0.1 else choices)
    return wrong, repr(wrong)


def _corrupted_tensor(value: Tensor, draw: random.Random) -> tuple[Any, str]:
    how = draw.choice(list(_CORRUPTING))
    with torch.no_grad():
        try:
            return _CORRUPTING[how](value, draw), how
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError):
            return value.new_zeros(0), "empty"


def _freed(value: Tensor, _draw: random.Random) -> Tensor:
    freed = value.detach().clone()
    freed.untyped_storage().resize_(0)
    return freed


def _freed_view(value: Tensor, draw: random.Random) -> Tensor:
    """Return what torch copies to work on, freed: without gaps, it would not be looked at twice."""
    source = value.detach()
    views = [
        source.repeat_interleave(2, -1)[..., ::2],
        source.transpose(0, -1).clone().transpose(0, -1),
        source[:1].clone().expand(value.shape),
    ]
    view = draw.choice(views)
    view.untyped_storage().resize_(0)
    return view


def _wild(value: Tensor, draw: random.Random) -> Tensor:
    """Return whole numbers out of all bounds, or numbers that are not finite."""
    corrupted = value.detach().clone()
    wild = _FLOATS if value.is_floating_point() else [-1, 2**31 - 1, -(2**31), 50, 10**6]
    corrupted.view(-1)[draw.randrange(max(1, value.numel()))] = draw.choice(wild)
    return corrupted


def _cut(value: Tensor, draw: random.Random) -> Tensor:
    dim = draw.randrange(value.dim())
    return value.detach().narrow(dim, 0, draw.randrange(value.shape[dim] + 1))


def _longer(value: Tensor, draw: random.Random) -> Tensor:
    return torch.cat([value.detach(), value.detach()], draw.randrange(value.dim()))


_CORRUPTING: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "freed": _freed,
    "freed view": _freed_view,
    "wild": _wild,
    "cut": _cut,
    "longer": _longer,
    "empty": lambda value, draw: value.new_zeros(0),
    "[1, 1]": lambda value, draw: value.new_zeros(1, 1),
    "one number": lambda value, draw: value.new_zeros(()),
    "a dimension more": lambda value, draw: value.detach()[None],
    "flat": lambda value, draw: value.detach().reshape(-1),
    "transposed": lambda value, draw: value.detach().transpose(0, -1),
    "every other": lambda value, draw: value.detach().repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda value, draw: value.detach()[:1].expand(value.shape),
    "another dtype": lambda value, draw: value.detach().to(draw.choice(_DTYPES)),
    "meta": lambda value, draw: value.detach().to("meta"),
    "sparse": lambda value, draw: value.detach().to_sparse(),
    "negative view": lambda value, draw: torch._neg_view(value.detach()),
    "none": lambda value, draw: None,
    "a million": lambda value, draw: value.new_zeros(1).expand(10**6),
    "read-only zeros": lambda value, draw: torch._efficientzerotensor(
        value.shape, dtype=value.dtype
    ),
}

_MAPPED: list[mmap.mmap] = []


def guarded(value: Any) -> Any:
    """Return a plain tensor's copy that ends where a forbidden page begins; all else as it is."""
    plain = isinstance(value, Tensor) and type(value) is Tensor and value.device.type == "cpu"
    if not plain or value.layout is not torch.strided or not value.is_contiguous():
        return value
    size = value.numel() * value.element_size()
    if not size or value.untyped_storage().nbytes() < size or value.is_neg():
        return value
    pages = -(-size // _PAGE)
    mapped = mmap.mmap(-1, (pages + 1) * _PAGE)
    _MAPPED.append(mapped)
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * _PAGE), _PAGE, 0):
        return value
    copy = torch.frombuffer(
        mapped, dtype=value.dtype, count=value.numel(), offset=pages * _PAGE - size
    ).view(value.shape)
    copy.copy_(value.detach())
    return copy.requires_grad_(value.requires_grad)
