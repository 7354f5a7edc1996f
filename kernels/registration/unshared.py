"""Tell whether a gradient is nobody's but the backward function's that was given it.

Such a gradient may be overwritten, so that a backward pass in place allocates nothing.  torch's
own AccumulateGrad asks the same of the gradient that it keeps as ``.grad``.  A gradient has other
holders where a hook or the caller of `torch.autograd.grad` kept it, where autograd adds another one
to it or saved it, or where its memory is that of another tensor.  All of them count: by C++
references to the tensor, by Python's, and by references to its storage, and so for the tensor that
it is a view of.

How many references a gradient has that nobody else holds depends on the versions of torch and
Python and on the frames between autograd's engine and the function that counts.  So the function
that counts is called once on gradients that certainly nobody else holds, and a gradient is
unshared where all its counts are the same as there.
"""

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Counts = tuple[int, ...]

_probing = threading.local()
_known: set[Counts] = set()
_lock = threading.Lock()


def _references(x: Tensor) -> Counts:
    storage = x.untyped_storage()
    counts = (x._use_count(), sys.getrefcount(x))  # type: ignore[attr-defined]
    return *counts, torch._C._storage_Use_Count(storage._cdata), sys.getrefcount(storage)


def is_unshared(grad: Tensor) -> bool:
    """Whether a backward function may overwrite the gradient that it was given.

    To be called as it was within `learn_counts`, from as many frames below autograd's engine.
    """
    if type(grad) is not Tensor or not grad.is_contiguous() or grad.is_neg() or grad.is_conj():
        return False
    if torch.is_grad_enabled() or grad.requires_grad or grad.is_inference():
        return False
    base = grad._base
    counts = _references(grad) if base is None else (*_references(grad), *_references(base))
    found: set[Counts] | None = getattr(_probing, "found", None)
    if found is not None:
        found.add(counts)
    return counts in _known


def learn_counts(apply_in_place: Callable[[Tensor], Any]) -> None:
    """Count, once for the process, on gradients that nobody else holds: whole ones, and views.

    Args:
        apply_in_place: a function that overwrites a tensor ``[1, 2]`` and whose backward function
            asks `is_unshared`; called on the CPU.
    """
    if _known:
        return
    found: set[Counts] = set()
    _probing.found = found
    try:
        with (
            _disable_current_modes(),
            torch.inference_mode(False),
            torch.enable_grad(),
            _without_hooks(),
        ):
            for shape in ((1, 2), (2, 1)):
                x = torch.zeros(1, 2, requires_grad=True).clone()
                apply_in_place(x)
                _Consumer.apply(x if shape == (1, 2) else x.view(shape)).backward()  # type: ignore[no-untyped-call]
    finally:
        del _probing.found
    with _lock:
        _known.update(found)


def _without_hooks() -> AbstractContextManager[object]:
    """Hide hooks for saved tensors, of which `torch.utils.checkpoint` counts the calls."""
    autograd: Any = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


class _Consumer(torch.autograd.Function):
    """Gives a gradient that it has just made, as operators do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.new_zeros(ctx.shape)
