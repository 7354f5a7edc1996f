"""Memory for combined gradients ``[P]`` that stays from one step to the next.

Gradients of a step are freed before the next one.  A CPU's allocator gives a block as large as the
gradients of a model back to the system, which hands it out again page by page: at 110 M parameters
that takes longer than to compute what is written there.
"""

import sys

import torch
from torch import Tensor


class KeptVector:
    """A vector whose memory is used again once nobody else refers to it.

    On GPUs it is allocated anew each time: torch's allocator keeps what is freed, and knows which
    streams still read it.
    """

    def __init__(self) -> None:
        self._vector: Tensor | None = None
        # Of the vector, which several tensors may share.  The one Python object that torch has for
        # it, since that counts as one reference however many there are to it.
        self._storage: torch.UntypedStorage | None = None
        self._own_references = self._references()

    def take(self, like: Tensor, size: int) -> Tensor:
        """Return ``[size]``, not initialised.

        Args:
            like: gives dtype and device, the same at each call.
            size: the same at each call.
        """
        if like.device.type != "cpu":
            return like.new_empty(size)
        if self._vector is None or not self._is_free(self._vector):
            self._vector = like.new_empty(size)
            self._storage = self._vector.untyped_storage()
            self._own_references = self._references()
        return self._vector

    def _is_free(self, vector: Tensor) -> bool:
        """Whether nobody else has a tensor, an array, a storage or a process on this memory."""
        return (
            self._references() == self._own_references
            and not vector.is_shared()
            and vector.untyped_storage().nbytes() == vector.nbytes  # nobody freed it
        )

    def _references(self) -> tuple[int, int]:
        """Count the references to the storage: those of tensors, and those of Python."""
        if self._storage is None:
            return 0, 0
        return torch._C._storage_Use_Count(self._storage._cdata), sys.getrefcount(self._storage)
