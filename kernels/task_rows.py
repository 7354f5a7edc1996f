"""The rows and columns of the gradient buffer that a layer writes its task gradients to.

A batch is one stream in which each task's tokens are contiguous, so the weight gradient of task
``k`` is the usual sum, taken over the tokens ``offsets[k]:offsets[k + 1]`` alone.  A layer that is
given :class:`TaskRows` writes these K sums into the K rows of a flat ``[K, P]`` buffer during the
one backward pass, instead of their total into ``weight.grad``.

Layers take the buffer and their columns, and make their views of it in the backward pass:
torch.compile then sees one tensor that is written piece by piece, and does not copy it.  Views made
beforehand would each look like a separate tensor, to be copied before it is written.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .registration.validation import check_data

NO_COLUMN = -1
"""In an operator's argument: there is no such parameter, or it is not trained."""


class TaskSegments(NamedTuple):
    """The rows of the stream, tokens or pooled vectors, that belong to each task.

    Attributes:
        offsets: ``K + 1`` ascending row numbers on the host.  Task ``k`` owns the rows
            ``offsets[k]:offsets[k + 1]``; rows from ``offsets[-1]`` on are padding.
        accumulate: add to the gradient rows (later micro-batches) instead of overwriting them.
    """

    offsets: tuple[int, ...]
    accumulate: bool = False

    @property
    def num_tasks(self) -> int:
        """The number of tasks, K."""
        return len(self.offsets) - 1


class Columns(NamedTuple):
    """The columns of a buffer that hold one parameter's gradients, flattened.

    Attributes:
        start: the first of them.
        shape: of the parameter.
    """

    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """One past the last column."""
        return self.start + math.prod(self.shape)


class TaskRows(NamedTuple):
    """The columns of a flat gradient buffer that belong to one layer.

    Attributes:
        buffer: ``[K, P]`` with contiguous rows, in the parameters' dtype.
        weight_columns: of the weight; None for a weight that is not trained.
        bias_columns: of the bias; None without a bias, or for one that is not trained.
        x_bias_columns: of the bias that a layer norm adds to its input, likewise.
    """

    buffer: Tensor
    weight_columns: Columns | None
    bias_columns: Columns | None = None
    x_bias_columns: Columns | None = None

    @property
    def weight(self) -> Tensor | None:
        """The weight's gradients, a view ``[K, *weight.shape]``."""
        return rows_at(self.buffer, *self.weight_columns) if self.weight_columns else None

    @property
    def bias(self) -> Tensor | None:
        """The bias's gradients, a view ``[K, *bias.shape]``."""
        return rows_at(self.buffer, *self.bias_columns) if self.bias_columns else None

    @property
    def x_bias(self) -> Tensor | None:
        """The gradients of the bias of a layer norm's input, a view ``[K, *x_bias.shape]``."""
        return rows_at(self.buffer, *self.x_bias_columns) if self.x_bias_columns else None

    @property
    def starts(self) -> tuple[int, int]:
        """The first columns of weight and bias, as operators take them."""
        return first_column(self.weight_columns), first_column(self.bias_columns)

    def checked(
        self,
        segments: TaskSegments | None,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        x_bias: Tensor | None = None,
    ) -> TaskSegments:
        """Return ``segments`` after checking them and these rows against the layer's tensors.

        Args:
            segments: the caller's argument, None included.
            weight: the layer's weight, any dtype, of the shape of its columns.
            bias: the layer's bias, likewise, or None.
            x: the layer's input; its first dimension is the stream.
            x_bias: what the layer adds to its input, likewise, or None.

        Raises:
            ValueError: an argument is missing or does not fit; the message names it.
        """
        if segments is None:
            raise ValueError("segments: needed with rows, to tell which task a row belongs to")
        buffer = self.buffer
        if buffer.dim() != 2 or len(buffer) != segments.num_tasks or buffer.stride(1) != 1:
            raise ValueError(
                f"rows.buffer: expected [{segments.num_tasks} tasks, columns] with contiguous "
                f"rows, got {list(buffer.shape)} with strides {buffer.stride()}"
            )
        check_data(**{"rows.buffer": buffer})
        self._check("weight", self.weight_columns, weight)
        self._check("bias", self.bias_columns, bias)
        self._check("x_bias", self.x_bias_columns, x_bias)
        if any(end < start for start, end in pairwise((0, *segments.offsets, x.shape[0]))):
            raise ValueError(
                f"segments.offsets: expected to ascend from 0 to {x.shape[0]} at most, "
                f"got {segments.offsets}"
            )
        return segments

    def _check(self, name: str, columns: Columns | None, parameter: Tensor | None) -> None:
        if columns is None:
            if parameter is not None and parameter.requires_grad:
                raise ValueError(f"rows.{name}_columns: None, but the layer's {name} is trained")
            return
        shape = None if parameter is None else tuple(parameter.shape)
        if tuple(columns.shape) != shape:
            raise ValueError(
                f"rows.{name}_columns: expected the shape of the layer's {name}, {shape}, "
                f"got {tuple(columns.shape)}"
            )
        if columns.start < 0 or columns.stop > self.buffer.shape[1]:
            raise ValueError(
                f"rows.{name}_columns: {columns.start} to {columns.stop} are not within the "
                f"{self.buffer.shape[1]} columns of the buffer"
            )


def first_column(columns: Columns | None) -> int:
    """Return the first of a parameter's columns, as operators take it."""
    return NO_COLUMN if columns is None else columns.start


def rows_at(buffer: Tensor, start: int, shape: Sequence[int]) -> Tensor:
    """Return the view ``[..., *shape]`` of ``buffer [..., P]`` that begins at column ``start``."""
    return buffer[..., start : start + math.prod(shape)].view((*buffer.shape[:-1], *shape))


def rows_of(buffer: Tensor, start: int, parameter: Tensor | None) -> Tensor:
    """Return the view that holds a parameter's gradients; no elements for :data:`NO_COLUMN`.

    An operator that writes gradient rows takes a tensor without elements, not None, where there are
    none to write: Inductor cannot compile an operator all of whose outputs are None.
    """
    if parameter is None or start == NO_COLUMN:
        return buffer.new_empty(0)
    return rows_at(buffer, start, parameter.shape)


def new_task_rows(
    num_tasks: int, weight: Tensor, bias: Tensor | None = None, *, fill: float = 0.0
) -> TaskRows:
    """Make rows for one layer in a buffer of its own.

    Args:
        num_tasks: K.
        weight: the layer's weight, any shape; the rows have its dtype and device.
        bias: the layer's bias, or None.
        fill: initial value of the rows; those of an embedding must begin at 0.

    Returns:
        Rows over a buffer ``[K, weight.numel() + bias.numel()]``.
    """
    of_weight = Columns(0, tuple(weight.shape))
    of_bias = None if bias is None else Columns(of_weight.stop, tuple(bias.shape))
    columns = (of_bias or of_weight).stop
    buffer = torch.full((num_tasks, columns), fill, dtype=weight.dtype, device=weight.device)
    return TaskRows(buffer, of_weight, of_bias)
