"""Check tensors for numbers that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all elements are finite; the device is read once, and nothing is copied.

    Args:
        tensors: floating point, of any shapes, on one device.
    """
    # NaN is both the least and the largest element to aminmax.
    ends = [end.float() for tensor in tensors if tensor.numel() for end in tensor.aminmax()]
    return not ends or bool(torch.stack(ends).isfinite().all())
