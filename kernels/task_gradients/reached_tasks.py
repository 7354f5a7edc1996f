"""Note in a backward pass which tasks have reached a parameter, in graphs of torch.compile, too.

A graph holds no sets of Python.  Its backward pass writes flags, which lie on the CPU wherever the
parameters do, so that reading them waits for nothing.  An operator on a CPU ends a CUDA graph of
torch.compile ("reduce-overhead"), which then is several.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..registration.backend import declare, register_fake
from ..registration.validation import check_data, check_offsets


@torch.library.custom_op("superbert::note_tasks_", mutates_args=("reached",), device_types="cpu")
def note_tasks_(reached: Tensor, parameters: Sequence[int], offsets: Sequence[int]) -> None:
    """Set the flags of the tasks that own rows of a layer's input.

    Args:
        reached: int64 ``[parameters, K]`` on the CPU, written.
        parameters: the numbers of the layer's parameters.
        offsets: K + 1 ascending row numbers; task k owns the rows from number k to the next.
    """
    if reached.dim() != 2 or reached.dtype != torch.int64:
        raise ValueError(f"reached: expected int64 [parameters, K], got {list(reached.shape)}")
    check_data(reached=reached)
    if not reached.is_contiguous():
        raise ValueError("reached: expected contiguous flags")
    check_offsets("offsets", offsets, max([0, *offsets]))
    if len(offsets) != reached.shape[1] + 1:
        raise ValueError(f"offsets: expected {reached.shape[1] + 1}, got {len(offsets)}")
    if any(not 0 <= parameter < len(reached) for parameter in parameters):
        raise ValueError(f"parameters: expected 0 to {len(reached) - 1}, got {list(parameters)}")
    tasks = [task for task, (begin, end) in enumerate(pairwise(offsets)) if begin < end]
    reached[torch.tensor(parameters, dtype=torch.int64)[:, None], torch.tensor(tasks).long()] = 1


def _note_fake(*_arguments: object) -> None:
    pass


register_fake("note_tasks_")(_note_fake)
declare("note_tasks_", cpu="torch", cuda=None)


class NoteTasks(torch.autograd.Function):
    """Identity on a layer's output; its backward pass notes that a loss reached the layer."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        reached: Tensor,
        parameters: tuple[int, ...],
        offsets: tuple[int, ...],
    ) -> Tensor:
        """Return ``out``."""
        # Not saved tensors: other backward passes write the flags in between.
        ctx.noted = reached, parameters, offsets
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Set the flags, and pass the gradient on."""
        note_tasks_(*ctx.noted)
        return gradient, None, None, None
