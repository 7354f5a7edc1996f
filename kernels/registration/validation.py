"""Checks of all kernels: dtypes, freed storages, and values on the device.

Operators of ``torch.ops`` are public, and tensors that autograd saved may have been changed, so
operators check everything that a kernel relies on: in C++ (csrc/check_torch.h), or, where their
CUDA side is Python, in the ``*_checks.py`` of their folder.  All raise ValueError, and name the
argument.

A tensor whose storage was freed, as FSDP does, has its shape and no memory; torch's own functions
crash on one.  Values on the device are boundaries and indices.

On the CPU every call checks values.  On a GPU looking at one means waiting for it, so there it is
for debugging: call :func:`check_cu_seqlens` where a batch is made, or run a step that misbehaves
within :func:`checked_values`.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Dtypes that every kernel takes; float64 is computed by its reference."""

KERNEL_DTYPES = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
"""Dtypes that the kernels compute in."""

_enabled = False


@contextmanager
def checked_values() -> Iterator[None]:
    """A context in which calls on CUDA tensors read and check boundaries and indices.

    Each look waits for the device.  Code that `torch.compile` has compiled is not checked, nor can
    a CUDA graph be captured.
    """
    global _enabled
    before, _enabled = _enabled, True
    try:
        yield
    finally:
        _enabled = before


def may_look(x: Tensor) -> bool:
    """Whether a call on ``x`` may read values in Python."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(x):
        return False
    return _enabled if x.is_cuda else x.device.type == "cpu"


def are_checked(x: Tensor) -> bool:
    """Whether a call of a kernel on ``x`` is to look at values in Python.

    The C++ kernels look themselves; the float64 references on a CPU do not.
    """
    return (x.is_cuda or x.dtype == torch.float64) and may_look(x)


def check_input(name: str, x: object) -> None:
    """Refuse what is no dense tensor of a dtype that every kernel takes, or has no data.

    Raises:
        TypeError: it is no tensor; the message names it.
        ValueError: it is sparse, of another dtype, or its storage was freed.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    check_data(**{name: x})


def check_number(name: str, value: Tensor | float | None, most: float = math.inf) -> None:
    """Refuse a setting that is not a finite number of at least 0.

    Args:
        name: of the setting.
        value: None, and tensors, which may lie on a device, pass.
        most: the largest number that it may be.

    Raises:
        ValueError: the message names it.
    """
    if value is None or isinstance(value, Tensor) or (0 <= value <= most and value < math.inf):
        return
    limit = "" if most == math.inf else f", and at most {most:.3g}"
    raise ValueError(f"{name}: expected a finite number of at least 0{limit}, got {value}")


def check_positive(name: str, value: float) -> None:
    """Refuse a setting that is not a finite number above 0.

    Raises:
        ValueError: the message names it.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")


def check_rates(betas: Sequence[float], **numbers: Tensor | float) -> None:
    """Refuse settings that an optimizer with two moments cannot have.

    Raises:
        ValueError: the message names it.
    """
    for number, beta in enumerate(betas, 1):
        if not 0 <= beta < 1:
            raise ValueError(f"beta{number}: expected 0 <= beta{number} < 1, got {beta}")
    for name, value in numbers.items():
        check_number(name, value)


def check_data(**tensors: Tensor | float | None) -> None:
    """Refuse tensors whose storage does not reach to their last element.

    Under torch.compile, and of tensors without a storage of their own, nothing is looked at.

    Args:
        tensors: by the name that the message gives them; None and numbers pass.

    Raises:
        ValueError: a storage was freed, or cut.
    """
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            continue
        try:
            held = x.untyped_storage().nbytes()
        except NotImplementedError:  # sparse, or within torch.func
            continue
        if isinstance(held, torch.SymInt):  # while torch 2.11 compiles; a comparison fixes the size
            continue
        if held < (needed := _needed_bytes(x)):
            raise ValueError(
                f"{name}: its storage holds {held} of {needed} bytes; was it freed, as FSDP frees "
                "parameters while their module does not run?"
            )


def _needed(x: Tensor) -> int:
    """Elements from a tensor's first to its last."""
    if x.is_contiguous():
        return x.numel()
    pairs = zip(x.shape, x.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)


def _needed_bytes(x: Tensor) -> int:
    return int((x.storage_offset() + _needed(x)) * x.itemsize) if x.numel() else 0


def check_kernel_dtype(name: str, x: Tensor) -> None:
    """Check a dtype that the kernels, and not the float64 references, compute in."""
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")


def check_tensor(
    name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a tensor of another shape, dtype or device, or whose storage was freed.

    Raises:
        ValueError: the message names it.
    """
    if x.shape != tuple(shape):
        raise ValueError(f"{name}: expected the shape {list(shape)}, got {list(x.shape)}")
    if x.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name}: expected on {device}, got {x.device}")
    check_data(**{name: x})


def check_rows_apart(name: str, rows: Tensor, **others: Tensor) -> None:
    """Refuse rows ``[K, ...]`` to be written that share memory with each other or other tensors.

    Columns of one buffer are apart; so are, in the others, strides that no buffer has taken for
    memory without gaps.

    Raises:
        ValueError: the message names both.
    """
    width = rows[0].numel()
    stride = rows.stride(0) if len(rows) > 1 else width
    if stride < width or not rows[0].is_contiguous():
        raise ValueError(f"{name}: expected rows that lie apart, each contiguous")
    memory = rows.untyped_storage().data_ptr()
    for other_name, other in others.items():
        if other.numel() == 0 or other.untyped_storage().data_ptr() != memory:
            continue
        in_buffer = len(other) > 1 and other.stride(0) == stride and other[0].is_contiguous()
        first = (other.data_ptr() - rows.data_ptr()) // rows.itemsize
        if in_buffer:
            share = first % stride < width or first % stride + other[0].numel() > stride
        else:
            share = -_needed(other) < first < _needed(rows)
        if share:
            raise ValueError(f"{name}: written, and so must not overlap {other_name}")


def check_offsets(name: str, offsets: Sequence[int], total: int) -> None:
    """Refuse row numbers that do not ascend within a stream of ``total`` rows.

    Raises:
        ValueError: the message names them.
    """
    if any(end < start for start, end in pairwise((0, *offsets, total))):
        raise ValueError(
            f"{name}: expected to ascend from 0 to {total} at most, got {list(offsets)}"
        )


def check_cu_seqlens(name: str, cu_seqlens: Tensor, total: int) -> None:
    """Check that boundaries start at 0, ascend and end within the stream.

    Args:
        name: what to call them in the message.
        cu_seqlens: ``[S + 1]``, any integer dtype, on any device, which is waited for.
        total: rows of the stream.

    Raises:
        ValueError: they do not.
    """
    check_data(**{name: cu_seqlens})
    values = cu_seqlens.tolist()
    if not values:
        raise ValueError(f"{name}: expected at least one offset, got none")
    if values[0] != 0:
        raise ValueError(f"{name}: expected to start at 0, got {values[0]}")
    for position, (start, end) in enumerate(pairwise(values)):
        if start > end:
            raise ValueError(
                f"{name}: expected ascending offsets, got {start} before {end} "
                f"at position {position}"
            )
    if values[-1] > total:
        raise ValueError(f"{name}: expected to end within the {total} rows, got {values[-1]}")


def check_order(order: Tensor, num_tasks: int) -> None:
    """Check that an order of projections has each task once in every row.

    Args:
        order: ``[K, K]``; its values are looked at on a CPU alone.
        num_tasks: K.

    Raises:
        TypeError: it is no tensor.
        ValueError: it does not.
    """
    if not isinstance(order, Tensor):
        raise TypeError(f"order: expected a tensor [K, K], got {type(order).__name__}")
    if order.shape != (num_tasks, num_tasks):
        raise ValueError(f"order: expected {[num_tasks] * 2}, got {list(order.shape)}")
    if not may_look(order):
        return
    check_data(order=order)
    for number, row in enumerate(order.tolist()):
        if sorted(row) != list(range(num_tasks)):
            raise ValueError(
                f"order: expected each of 0 to {num_tasks - 1} once in every row, got {row} "
                f"in row {number}"
            )


def check_index(name: str, index: Tensor, num_rows: int) -> None:
    """Check that all indices are rows of a table.

    Args:
        name: what to call them in the message.
        index: integers of any shape on any device, which is waited for.
        num_rows: rows of the table.

    Raises:
        ValueError: they are not.
    """
    if index.numel() == 0:
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < 0 or high >= num_rows:
        raise ValueError(f"{name}: expected 0 <= index < {num_rows}, got {low} to {high}")
