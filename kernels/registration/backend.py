"""Declare which backend runs an operator on a device.

Every operator has one backend for each kind of device, chosen when the package is imported
and never silently replaced.  Each kernel file declares its own here.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ..gradient_queue import enqueue, join_for

Kind = Literal["cpp", "cuda", "triton", "torch"]

_declared: dict[tuple[str, str], Kind] = {}


def declare(op: str, *, cpu: Kind, cuda: Kind | None) -> None:
    """Declare the backends of ``superbert::op`` on CPU and on CUDA tensors (None: no backend)."""
    _declared[op, "cpu"] = cpu
    if cuda is not None:
        _declared[op, "cuda"] = cuda


Fake = Callable[..., Any]


def register_fake(op: str) -> Callable[[Fake], Fake]:
    """Register the outputs of ``superbert::op`` for tensors without data, all of one device.

    torch asks it as well where a tensor of the device ``meta`` is among others, and takes what it
    returns, or leaves as it is, for the result; so that is refused.

    Args:
        op: the operator's name without namespace.

    Returns:
        A decorator of a function of the operator's arguments.
    """
    schema = getattr(torch.ops.superbert, op).default._schema
    names = [argument.name for argument in schema.arguments]

    def register(fake: Fake) -> Fake:
        def checked(*arguments: Any) -> Any:
            _shorten_messages_of_inductor()
            device = None
            for name, x in zip(names, arguments, strict=False):
                if isinstance(x, Tensor):
                    device = device or x.device
                    if x.device != device:
                        raise ValueError(f"{name}: expected on {device}, got {x.device}")
            return fake(*arguments)

        torch.library.register_fake(f"superbert::{op}", checked)
        return fake

    return register


Launch = Callable[..., Any]


def register_cuda(op: str, *, only_rows: bool = False) -> Callable[[Launch], Launch]:
    """Register the Python function that runs ``superbert::op`` on CUDA tensors.

    It runs with the device of the first argument, a tensor, as the current one: Triton launches on
    the current device, which torch does not set for an operator in Python.

    Within :func:`~kernels.gradient_queue.queued` it waits for the gradient rows among its arguments
    that are still being written.

    Args:
        op: the operator's name without namespace.
        only_rows: it writes gradient rows and nothing else, so that it can run beside the rest of a
            backward pass.

    Returns:
        A decorator of a function of the operator's arguments.
    """

    def register(launch: Launch) -> Launch:
        @functools.wraps(launch)
        def run(*arguments: Any) -> Any:
            with torch.cuda.device(arguments[0].get_device()):
                if only_rows:
                    return enqueue(launch, arguments)
                join_for(arguments)
                return launch(*arguments)

        torch.library.impl(f"superbert::{op}", "CUDA", run)
        return launch

    return register


def _operator_name(target: object, _args: object, _kwargs: object) -> str:
    return f"  target: {target}"


@functools.cache
def _shorten_messages_of_inductor() -> None:
    """Keep torch 2.11 and 2.12 from hanging while they compile a deep model.

    Where Inductor first meets an operator, these make a text of all that its arguments were
    computed from, though nobody reads it; the text doubles with every layer.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        from torch._inductor import exc

        exc.OperatorIssue.operator_str = staticmethod(_operator_name)  # type: ignore[assignment]


def backend(op: str, device: torch.device | str) -> Kind:
    """Return the backend that runs an operator on a device.

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


def backends() -> dict[tuple[str, str], Kind]:
    """Return the backend of every operator on every type of device: ``{(op, "cpu"): "cpp"}``."""
    return dict(_declared)
