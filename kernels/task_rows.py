"""Where a layer writes the gradients of its weights, one row for each task.

A batch is one stream in which every task's rows lie side by side, so the weight gradient of
task ``k`` is the part of the usual sum over rows ``offsets[k]:offsets[k + 1]``.  A layer that is
given :class:`TaskRows` writes these K parts straight into row ``k`` of a flat ``[K, P]`` buffer
during the one backward pass, instead of their sum into ``weight.grad``.
"""

from typing import NamedTuple

from torch import Tensor


class TaskSegments(NamedTuple):
    """Which rows of the stream belong to which task.

    Attributes:
        offsets: ``K + 1`` ascending row numbers on the host.  Task ``k`` owns the rows
            ``offsets[k]:offsets[k + 1]``; rows from ``offsets[-1]`` on are padding of no task.
        accumulate: add to the gradient rows (later micro-batches) instead of overwriting them.
    """

    offsets: tuple[int, ...]
    accumulate: bool = False

    @property
    def num_tasks(self) -> int:
        """K, the number of segments."""
        return len(self.offsets) - 1


class TaskRows(NamedTuple):
    """Views of the flat ``[K, P]`` gradient buffer that belong to one layer.

    Attributes:
        weight: ``[K, *weight.shape]``; the inner dimensions are contiguous, ``stride(0)`` is the
            buffer's row length.
        bias: ``[K, *bias.shape]``, likewise, or None for a layer without bias.
    """

    weight: Tensor
    bias: Tensor | None = None

    def of(self, task: int) -> "TaskRows":
        """Return the rows of one task, for a layer that this task uses by itself."""
        one = slice(task, task + 1)
        return TaskRows(self.weight[one], None if self.bias is None else self.bias[one])

    def checked(
        self, segments: TaskSegments | None, weight: Tensor, bias: Tensor | None, x: Tensor
    ) -> TaskSegments:
        """Return ``segments`` after holding them and these rows against the layer's tensors.

        Args:
            segments: the caller's argument, None included.
            weight: the layer's weight.
            bias: the layer's bias, or None.
            x: the layer's input; its first dimension is the stream.

        Raises:
            ValueError: something is missing or does not fit; the message names it.
        """
        if segments is None:
            raise ValueError("segments: needed with rows, to tell which task a row belongs to")
        num_tasks = segments.num_tasks
        if self.weight.shape != (num_tasks, *weight.shape):
            raise ValueError(
                f"rows.weight: expected shape {(num_tasks, *weight.shape)} (tasks, *weight.shape), "
                f"got {tuple(self.weight.shape)}"
            )
        if (bias is None) != (self.bias is None):
            raise ValueError("rows.bias: must be given exactly when the layer has a bias")
        if (
            bias is not None
            and self.bias is not None
            and self.bias.shape != (num_tasks, *bias.shape)
        ):
            raise ValueError(
                f"rows.bias: expected shape {(num_tasks, *bias.shape)} (tasks, *bias.shape), "
                f"got {tuple(self.bias.shape)}"
            )
        if segments.offsets[-1] > x.shape[0]:
            raise ValueError(
                f"segments.offsets: end at row {segments.offsets[-1]}, the stream has {x.shape[0]}"
            )
        return segments
