"""LAMB on flat parameters, for large batches."""

from collections.abc import Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor

from .._kernels import kernels
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment
from .adamw import AdamSettings, AdamW


class Lamb(AdamW):
    """LAMB (You et al. 2020): Adam's direction, each tensor's step as long as the tensor itself.

    Args:
        parameters: what is updated; matrices decay, biases and norms do not.
        factors: on the learning rate of each stage, by its name; None or empty: 1.
        settings: see :class:`.AdamSettings`.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        factors: Mapping[str, float] | None = None,
        **settings: Unpack[AdamSettings],
    ) -> None:
        super().__init__(parameters, **settings)
        starts = [slot.offset for slot in parameters.slots.values()]
        self._offsets = [*starts, parameters.numel]
        self._no_rate = torch.zeros((), device=parameters.master.device)
        self._lr_factors: Tensor | None = None
        if factors:
            of_tensors = [factors[parameters.specs[name].stage.name] for name in parameters.slots]
            self._lr_factors = torch.tensor(of_tensors, device=parameters.master.device)

    def step(
        self,
        weights: Tensor,
        segments: Sequence[Segment],
        *,
        lr: Tensor,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """As AdamW's: one pass over the rows for the moments, then one for the weights."""
        super().step(weights, segments, lr=self._no_rate, scale=scale, skip=skip)
        flat = self._own
        kernels.lamb_update_(
            flat.master,
            self.exp_avg,
            self.exp_avg_sq,
            self._offsets,
            None if flat.compute is flat.master else flat.compute,
            lr=lr if self._lr_factors is None else lr * self._lr_factors,
            step=self.updates,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decayed=flat.decayed,
            skip=skip,
        )
