"""Count the bytes of tensors that live while a block of code runs."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make in a ``with`` block, forward and backward.

    What was there before does not count, nor what an operator allocates and frees within itself.
    Operators compute what they do outside, to the bit; each call takes some microseconds longer.
    Other threads are not watched: on a CPU, the backward pass runs in the thread that starts it.

    Attributes:
        live: bytes of the storages that were made and not freed yet.
        peak: the most that ``live`` was.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.finalize[Any, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operator, and count the storages that it returns and was not given."""
        for given in tree_leaves((args, kwargs)):
            self._count(given, made=False)
        result = func(*args, **(kwargs or {}))
        for returned in tree_leaves(result):
            self._count(returned, made=True)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, of 100 MiB, only to turn it off

    def __exit__(self, *error: Any) -> None:
        """Stop counting."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for finalizer in list(self._known.values()):
            finalizer.detach()
        self._known.clear()

    def _count(self, value: object, *, made: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        address = storage._cdata
        if address in self._known:
            return
        size = storage.nbytes() if made else 0
        self._known[address] = weakref.finalize(storage, self._forget, address, size)
        self.live += size
        self.peak = max(self.peak, self.live)

    def _forget(self, address: int, size: int) -> None:
        self._known.pop(address, None)
        self.live -= size
