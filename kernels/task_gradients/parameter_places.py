"""Where the task gradients of a parameter go, and which losses reached it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..embedding.embedding import embedding
from ..gradient_buffer import Slot
from ..task_rows import Columns, TaskRows, TaskSegments
from .reached_tasks import NoteTasks


class Place(NamedTuple):
    """Rows of one parameter's task gradients.

    Attributes:
        slot: the parameter's columns.
        buffer: ``[K, P]``.
        tasks: whose losses have reached the parameter since the rows were cleared, in eager layers.
        number: of the parameter.
        reached: int64 ``[parameters, K]`` on the CPU, flags of those in compiled layers.
    """

    slot: Slot
    buffer: Tensor
    tasks: set[int]
    number: int
    reached: Tensor

    @property
    def name(self) -> str:
        """The parameter's, in its model."""
        return self.slot.name

    @property
    def rows(self) -> Tensor:
        """``[K, *shape]``, the gradients."""
        return self.slot.view(self.buffer)


def task_rows(weight: Place | None, bias: Place | None) -> TaskRows:
    """Join the places of a layer's parameters; None stands for a frozen one, or none."""
    first = weight or bias
    assert first is not None
    columns = (None if place is None else place.slot.columns for place in (weight, bias))
    return TaskRows(first.buffer, *columns)


def spread_bias(bias: Tensor, place: Place, count: int, segments: TaskSegments) -> Tensor:
    """Give every row a bias whose weight is frozen: a table with one row, looked up by each."""
    index = torch.zeros(count, dtype=torch.int64, device=bias.device)
    rows = TaskRows(place.buffer, Columns(place.slot.offset, (1, *bias.shape)))
    return embedding(index, bias[None], rows=rows, segments=segments)


class StandIn(torch.autograd.Function):
    """A view of a parameter whose gradient goes into a task's row, and not to autograd."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, place: Place, task: int, writable: bool) -> Tensor:
        """Return the view, one that may be written in place where ``writable``."""
        ctx.save_for_backward(torch.empty(0))  # as _Note does
        ctx.place, ctx.task = place, task
        # As on a parameter, writing in place is an error on a view that a function returns.
        return parameter.detach() if writable else parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, None]:
        """Add the gradient to the task's row."""
        assert ctx.saved_tensors
        ctx.place.rows[ctx.task].add_(gradient.detach())
        ctx.place.tasks.add(ctx.task)
        return None, None, None, None


class _Note(torch.autograd.Function):
    """Identity on a layer's output; its backward pass records that a loss reached the layer."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, places: Sequence[Place], tasks: set[int], is_saved: bool
    ) -> Tensor:
        # Activation checkpointing compares what was saved with what is saved when layers run again.
        # One tensor more than the plain layer saves: where that one is run instead, it raises.
        ctx.save_for_backward(torch.empty(0))
        ctx.places, ctx.tasks = places, tasks
        if is_saved:  # by the layer, which would take it for modified
            return out.view_as(out)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        assert ctx.saved_tensors
        for place in ctx.places:
            place.tasks.update(ctx.tasks)
        return gradient, None, None, None


def note(
    out: Tensor, places: Sequence[Place], segments: TaskSegments, *, is_saved: bool = False
) -> Tensor:
    """Note, once a loss reaches ``out``, that its tasks have reached the parameters.

    ``is_saved`` says that the backward pass of the layer reads ``out``, too.
    """
    if torch.compiler.is_compiling():
        numbers = tuple(place.number for place in places)
        return NoteTasks.apply(out, places[0].reached, numbers, segments.offsets)  # type: ignore[no-untyped-call]
    tasks = {task for task, (begin, end) in enumerate(pairwise(segments.offsets)) if begin < end}
    return _Note.apply(out, places, tasks, is_saved)  # type: ignore[no-untyped-call]
