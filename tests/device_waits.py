"""Demands that a piece of code never waits for the GPU, and that a CUDA graph can hold it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def no_wait_for_the_device() -> Iterator[None]:
    """Raise a RuntimeError within, where the host waits for the GPU; outside, never."""
    _set("error")
    try:
        yield
    finally:
        _set("default")


def _set(mode: str) -> None:
    with warnings.catch_warnings():  # torch says on first use that the mode is a prototype
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


class NotRecordableError(RuntimeError):
    """A call that a CUDA graph cannot hold."""


_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
_READS |= {"_unique2", "unique_dim", "unique_consecutive", "bincount", "allclose"}


class RecordableOnly(TorchDispatchMode):
    """Within it torch calls that a CUDA graph of them could not hold raise; works on a CPU too.

    A tensor of a list of the host is a copy that waits, and would be replayed from freed memory;
    other calls read a value, or a number of elements that the device knows.  C++ and Triton kernels
    are single calls here.

    Attributes:
        calls: the names of all operators, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls.append(str(func))
        if name in ("lift_fresh", "lift_fresh_copy"):
            raise NotRecordableError("a tensor is made of numbers of the host")
        if name in _READS:
            raise NotRecordableError(f"{func} reads the device")
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise NotRecordableError(f"{func} by a mask reads the device")
        if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
            raise NotRecordableError(f"{func} without output_size reads the device")
        return func(*args, **(kwargs or {}))
