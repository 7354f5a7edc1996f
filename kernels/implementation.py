"""Which code runs an operator on a device.

Every operator has one implementation for each kind of device, chosen when the package is imported
and never silently replaced.  Each kernel file declares its own here.
"""

from typing import Literal

import torch

Kind = Literal["cpp", "cuda", "triton", "torch"]

_declared: dict[tuple[str, str], Kind] = {}


def declare(op: str, *, cpu: Kind, cuda: Kind | None) -> None:
    """Declare what runs ``superbert::op`` on CPU and on CUDA tensors (None: nothing does)."""
    _declared[op, "cpu"] = cpu
    if cuda is not None:
        _declared[op, "cuda"] = cuda


def implementation(op: str, device: torch.device | str) -> Kind:
    """What runs an operator on a device.

    Args:
        op: the operator's name without namespace, such as ``"gram"``.
        device: a device or its name; only its type matters.

    Returns:
        ``"cpp"`` (the C++ extension), ``"cuda"`` (its CUDA part), ``"triton"``, or ``"torch"``
        (plain torch operations).

    Raises:
        ValueError: if there is no such operator, or none for this device.
    """
    key = (op, torch.device(device).type)
    if key not in _declared:
        known = ", ".join(sorted({name for name, _ in _declared}))
        raise ValueError(f"no operator {op!r} for device type {key[1]!r}; operators: {known}")
    return _declared[key]
