"""Tell torch calls that compute with a parameter from those that only concern it as an object."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

WRITE_WEIGHTS = (F.embedding, F.embedding_bag)  # with max_norm, where autograd does not look
# Views among the attributes, and methods that concern the tensor as an object: gradient, layout, …
_VIEWS = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "imag"))
_OBJECT_METHODS = frozenset(
    {
        Tensor.__deepcopy__,
        Tensor.__reduce_ex__,
        Tensor.backward,
        Tensor.register_hook,
        Tensor.register_post_accumulate_grad_hook,
        Tensor.is_contiguous,
        Tensor.numel,
        Tensor.requires_grad_,
        Tensor.retain_grad,
        Tensor.storage_offset,
        Tensor.stride,
        Tensor.untyped_storage,
        torch.autograd.backward,
        torch.autograd.grad,
    }
)


def uses_values(func: Callable[..., Any]) -> bool:
    """Whether a call may compute with the values of tensors."""
    if getattr(func, "__name__", None) in ("__get__", "__set__", "__delete__"):
        return func in _VIEWS
    return func not in _OBJECT_METHODS


def is_written_in_python(func: Callable[..., Any]) -> bool:
    """Whether it is a tensor's method that torch.compile knows by its name alone."""
    return getattr(func, "__module__", None) == "torch._tensor"
