"""Where a layer writes the gradients of its weights, one row for each task.

A batch is one stream in which every task's rows lie side by side, so the weight gradient of
task ``k`` is the part of the usual sum over rows ``offsets[k]:offsets[k + 1]``.  A layer that is
given :class:`TaskRows` writes these K parts straight into row ``k`` of a flat ``[K, P]`` buffer
during the one backward pass, instead of their sum into ``weight.grad``.
"""

from typing import NamedTuple

from torch import Tensor


class TaskRows(NamedTuple):
    """Views of the flat ``[K, P]`` gradient buffer that belong to one layer.

    Attributes:
        weight: ``[K, *weight.shape]``; the inner dimensions are contiguous, ``stride(0)`` is the
            buffer's row length.
        bias: ``[K, *bias.shape]``, likewise, or None for a layer without bias.
    """

    weight: Tensor
    bias: Tensor | None = None


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
