"""The optimizers that a recipe can name."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Unpack

from torch import Tensor

from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment
from ..utils.errors import InputError
from .adamw import AdamSettings, AdamW
from .apex import CLASSES, ApexOptimizer
from .lamb import Lamb
from .torch_optimizer import NAMED, TorchOptimizer, is_torch

OPTIMIZERS = ("adamw", "lamb", *CLASSES, *NAMED)


class Optimizer(Protocol):
    """Interface of an optimizer to a training step and a checkpoint.

    Attributes:
        updates: 0-dim fp32, the steps that were not skipped.
    """

    updates: Tensor

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Vectors ``[S]`` fp32 beside the weights that it updates, such as moments, by name."""

    @property
    def state(self) -> dict[str, Tensor]:
        """Further tensors that a checkpoint keeps, by name."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state of the names and shapes of :attr:`state`."""

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
    name: str,
    parameters: FlatParameters,
    factors: Mapping[str, float] | None = None,
    arguments: Mapping[str, Any] | None = None,
    **settings: Unpack[AdamSettings],
) -> Optimizer:
    """Make the optimizer that a recipe names.

    Args:
        name: one of :data:`OPTIMIZERS`, or ``torch.`` and a class of torch.optim.
        parameters: what is updated; matrices decay, biases and norms do not.
        factors: on the learning rate of each stage (:func:`.lr_factors`); None or empty: 1.
        arguments: of a class of torch.optim (:func:`.torch_arguments`); others take none.
        settings: see :class:`.AdamSettings`.

    Raises:
        InputError: it is apex's and apex is not installed, or ``factors`` are given.
    """
    if is_torch(name):
        decay = settings["weight_decay"]
        return TorchOptimizer(name, parameters, factors, arguments or {}, decay)
    if name in CLASSES:
        if factors:
            raise InputError(
                f"optimizer = {name}: has one learning rate for all; leave out layer_lr_decay and "
                "head_lr, or take adamw or lamb"
            )
        return ApexOptimizer(name, parameters, **settings)
    return {"adamw": AdamW, "lamb": Lamb}[name](parameters, factors, **settings)
