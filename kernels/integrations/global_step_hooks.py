"""Call global step hooks once where one optimizer steps another.

Torch calls these hooks around the step of every optimizer, so a wrapper's step would call each
twice: for the wrapper and for the optimizer that it steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

_inner: ContextVar[tuple[Optimizer, ...]] = ContextVar("inner", default=())


class _ExceptInner:
    """A global hook that is not called for optimizers which a wrapper is stepping."""

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, optimizer: Optimizer, *arguments: Any) -> Any:
        if optimizer in _inner.get():
            return None
        return self._hook(optimizer, *arguments)


def spare_inner() -> None:
    """Make the global hooks that are registered now pass over optimizers in :func:`stepping`.

    They stay in torch's tables under their keys, so that their handles remove them.
    """
    for hooks in (
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ):
        for key, hook in hooks.items():
            if not isinstance(hook, _ExceptInner):
                hooks[key] = _ExceptInner(hook)


@contextmanager
def stepping(inner: Optimizer) -> Iterator[None]:
    """Call no global step hooks for an optimizer, nor for one that it wraps as ``optimizer``.

    Those of other optimizers, stepped by a closure or in another thread, are called.

    Args:
        inner: the optimizer that a wrapper is about to step.
    """
    own = [inner]
    while isinstance(wrapped := getattr(own[-1], "optimizer", None), Optimizer):
        if wrapped in own:
            break
        own.append(wrapped)
    spare_inner()
    token = _inner.set((*_inner.get(), *own))
    try:
        yield
    finally:
        _inner.reset(token)
