"""The report of one training step."""

from typing import NamedTuple

from torch import Tensor


class StepReport(NamedTuple):
    """Report of one step, as fp32 tensors on its device.

    K is the number of tasks in the step's batch: all, or one if each step trains one task.

    Attributes:
        losses: ``[K]``, each as its task defines it, unweighted.
        gram: ``[K, K]``, the dot products of the task gradients.
        weights: ``[K]``, of the task gradients in the update, averaged over the parameter groups.
        grad_norm: 0-dim, of the combined gradient before clipping.
        skipped: 0-dim, 1 where a gradient was not finite and nothing was updated.
        tasks: the names of the K tasks.
        layer_grams: ``[L, K, K]``, those of each watched group, times the loss scale
            squared; None where none are watched.
    """

    losses: Tensor
    gram: Tensor
    weights: Tensor
    grad_norm: Tensor
    skipped: Tensor
    tasks: tuple[str, ...]
    layer_grams: Tensor | None
