"""The gradient buffer ``[K, P]``: row k is the gradient of task k.

Each parameter has a :class:`Slot`, the columns of its gradients.  Layers write them through
:class:`.TaskRows`; surgery reads whole rows, or segments of columns that are balanced separately.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from .surgery.surgery import combine, gram
from .task_rows import Columns, TaskRows, rows_at

ALIGNMENT = 64
"""Parameters start at multiples of it: whole cache lines and 16-byte accesses in every dtype."""


class Slot(NamedTuple):
    """The columns of one parameter in a flat vector or buffer.

    Attributes:
        name: of the parameter.
        offset: the first column.
        shape: of the parameter.
    """

    name: str
    offset: int
    shape: tuple[int, ...]

    @property
    def columns(self) -> Columns:
        """The columns, as layers take them."""
        return Columns(self.offset, tuple(self.shape))

    def view(self, flat: Tensor) -> Tensor:
        """Return the view ``[..., *shape]`` of this parameter's columns in ``flat [..., P]``."""
        return rows_at(flat, self.offset, self.shape)


def lay_out(
    shapes: Mapping[str, Sequence[int]], start: int = 0, alignment: int = ALIGNMENT
) -> tuple[tuple[Slot, ...], int]:
    """Place parameters one after the other.

    Args:
        shapes: of the parameters, by name.
        start: the first column, a multiple of the alignment.
        alignment: every parameter takes up a multiple of it; 1 leaves no gaps.

    Returns:
        A slot for each parameter, in their order, and the first column after the last one.
    """
    slots, end = [], start
    for name, shape in shapes.items():
        slots.append(Slot(name, end, tuple(shape)))
        end += round_up(math.prod(shape), alignment)
    return tuple(slots), end


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple that is not below ``count``."""
    return -(-count // multiple) * multiple


class Segment(NamedTuple):
    """Neighbouring columns of parameters of one group, which get the same weights."""

    group: int
    columns: slice


class GradientBuffer:
    """The task gradients of parameters of one dtype and device.

    Args:
        slots: of the parameters, ascending.
        rows: ``[K, P]``; gaps between the slots hold zeros.
        groups: for each slot the number of its group, whose parameters share their weights; None:
            one group.

    Attributes:
        slots: of the parameters.
        rows: ``[K, P]``.
        segments: the groups' columns, ascending; a group may have several.
    """

    def __init__(
        self, slots: Sequence[Slot], rows: Tensor, groups: Sequence[int] | None = None
    ) -> None:
        self.slots, self.rows = tuple(slots), rows
        self.segments = tuple(_segments(self.slots, groups or (0,) * len(slots)))

    def task_rows(self, weight: Slot | None, bias: Slot | None = None) -> TaskRows:
        """Return the rows for a layer's gradients; None for a parameter that it does not have."""
        return TaskRows(
            self.rows, *(None if slot is None else slot.columns for slot in (weight, bias))
        )

    def resize(self, num_tasks: int) -> None:
        """Make the buffer one of ``num_tasks`` tasks, all zero."""
        if len(self.rows) == num_tasks:
            self.rows.zero_()
        else:
            self.rows = self.rows.new_zeros(num_tasks, self.rows.shape[1])

    def grams(self) -> Tensor:
        """``[S, K, K]``: the Gram matrix of each segment."""
        return gram(self.rows, [0, *(segment.columns.stop for segment in self.segments)])

    def combine(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Combine every segment by its group's row of the weights ``[G, K]``, into ``out [P]``."""
        out = self.rows.new_empty(self.rows.shape[1]) if out is None else out
        exact = self.rows.dtype == torch.float64
        weights = weights.to(self.rows.device, torch.float64 if exact else torch.float32)
        for group, columns in self.segments:
            combine(self.rows[:, columns], weights[group], out[columns])
        return out


def _segments(slots: Sequence[Slot], groups: Sequence[int]) -> Iterator[Segment]:
    """Join neighbours of a group."""
    for group, members in groupby(zip(groups, slots, strict=True), key=lambda pair: pair[0]):
        own = [slot for _, slot in members]
        yield Segment(group, slice(own[0].offset, own[-1].columns.stop))
