"""The optimizers that a recipe can name."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .apex_optimizer import CLASSES, ApexOptimizer
from .flat_parameters import FlatParameters
from .lamb import Lamb
from .optimizer import AdamW
from .parts import Region

OPTIMIZERS = ("adamw", "lamb", *CLASSES)


class Optimizer(Protocol):
    """What a training step and a checkpoint ask of an optimizer.

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
        regions: Sequence[Region],
        *,
        lr: Tensor,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Update weights and moments; see :meth:`.AdamW.step`."""


def build_optimizer(
    name: str,
    parameters: FlatParameters,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> Optimizer:
    """Make the optimizer that a recipe names.

    Args:
        name: one of :data:`OPTIMIZERS`.
        parameters: what is updated; matrices decay, biases and norms do not.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.

    Raises:
        InputError: it is apex's and apex is not installed.
    """
    if name in CLASSES:
        return ApexOptimizer(name, parameters, betas=betas, eps=eps, weight_decay=weight_decay)
    own = {"adamw": AdamW, "lamb": Lamb}[name]
    return own(parameters, betas=betas, eps=eps, weight_decay=weight_decay)
