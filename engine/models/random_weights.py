"""Build models without drawing the random weights that are replaced at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_))


class WithoutRandomWeights(TorchFunctionMode):
    """Within its ``with`` block ``normal_`` fills with the mean, ``uniform_`` with its lower bound.

    For models whose weights are all read from a file: drawing those of BERT-base takes a second.
    A tensor left as it is would keep ``trunc_normal_`` drawing for ever, until all lies within its
    bounds.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or fill a tensor in its place."""
        kwargs = kwargs or {}
        if func not in _DRAWS:
            return func(*args, **kwargs)
        first = "mean" if func is torch.Tensor.normal_ else "from"
        return args[0].fill_(args[1] if len(args) > 1 else kwargs.get(first, 0.0))
