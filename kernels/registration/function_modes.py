"""Torch function modes that see this package's layers, in graphs of torch.compile, too.

While torch.compile traces a call, ``has_torch_function`` does not tell of modes; the stack of them
does.
"""

import torch
from torch.overrides import TorchFunctionMode


class LayerMode(TorchFunctionMode):
    """Base of the modes that look at layers."""


def active_layer_modes() -> list[LayerMode]:
    """Return those that are active, the innermost last."""
    count = torch._C._len_torch_function_stack()
    modes = [torch._C._get_function_stack_at(place) for place in range(count)]
    return [mode for mode in modes if isinstance(mode, LayerMode)]
