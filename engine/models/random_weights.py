"""Build models without drawing the random weights that are replaced at once."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWS = frozenset((torch.Tensor.normal_, torch.Tensor.uniform_))


class WithoutRandomWeights(TorchFunctionMode):
    """Within its ``with`` block ``normal_`` and ``uniform_`` leave a tensor as it is.

    For models whose weights are all read from a file: drawing those of BERT-base takes a second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, or leave it out."""
        return args[0] if func in _DRAWS else func(*args, **(kwargs or {}))
