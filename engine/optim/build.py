"""The optimizers that a recipe can name."""

from collections.abc import Sequence
from typing import Protocol, Unpack

from torch import Tensor

from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment
from .adamw import AdamSettings, AdamW
from .apex import CLASSES, ApexOptimizer
from .lamb import Lamb

OPTIMIZERS = ("adamw", "lamb", *CLASSES)


class Optimizer(Protocol):
    """Interface of an optimizer to a training step and a checkpoint.

    Attributes:
        exp_avg: ``[P]`` fp32, the first moment.
        exp_avg_sq: ``[P]`` fp32, the second.
        updates: 0-dim fp32, the steps that were not skipped.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    updates: Tensor

    def step(
        self,
        weights: Tensor,
        segments: Sequence[Segment],
        *,
        lr: Tensor,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Update weights and moments; see :meth:`.AdamW.step`."""


def build_optimizer(
    name: str, parameters: FlatParameters, **settings: Unpack[AdamSettings]
) -> Optimizer:
    """Make the optimizer that a recipe names.

    Args:
        name: one of :data:`OPTIMIZERS`.
        parameters: what is updated; matrices decay, biases and norms do not.
        settings: see :class:`.AdamSettings`.

    Raises:
        InputError: it is apex's and apex is not installed.
    """
    if name in CLASSES:
        return ApexOptimizer(name, parameters, **settings)
    return {"adamw": AdamW, "lamb": Lamb}[name](parameters, **settings)
