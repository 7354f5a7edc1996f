"""AdamW on flat parameters, fed with the task gradients and their weights.

The combined gradient ``sum_k c_k g_k`` is never stored: combining it and updating weights and
moments is one pass over memory (``kernels.combine_adamw_``).
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..rooms import kernels
from .flat_parameters import FlatParameters


class AdamW:
    """AdamW (Loshchilov and Hutter 2019), with fp32 master weights and moments.

    Args:
        parameters: what is updated; matrices decay, biases and norms do not.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.exp_avg = torch.zeros_like(parameters.master)
        self.exp_avg_sq = torch.zeros_like(parameters.master)
        self.updates = torch.zeros((), device=parameters.master.device)  # skipped steps excluded
        self._parameters = parameters

    def step(self, weights: Tensor, *, lr: Tensor, scale: Tensor, skip: Tensor) -> None:
        """Update weights and moments with ``scale * sum_k weights[k] * rows[k]``.

        Args:
            weights: ``[K]`` fp32.
            lr: 0-dim fp32.
            scale: 0-dim fp32, the clip factor (and the inverse of a loss scale).
            skip: 0-dim bool; true leaves weights, moments and the count of updates untouched.
        """
        flat = self._parameters
        self.updates += (~skip).to(self.updates.dtype)
        for part in self._parts():
            kernels.combine_adamw_(
                flat.rows[:, part.columns],
                weights,
                flat.master[part.columns],
                self.exp_avg[part.columns],
                self.exp_avg_sq[part.columns],
                None if flat.compute is flat.master else flat.compute[part.columns],
                lr=lr,
                step=self.updates,
                betas=self.betas,
                eps=self.eps,
                weight_decay=part.weight_decay,
                scale=scale,
                skip=skip,
            )

    def _parts(self) -> Iterator["_Part"]:
        decayed, numel = self._parameters.decayed, self._parameters.numel
        if self.weight_decay == 0:
            yield _Part(slice(0, numel), 0.0)
        else:
            yield _Part(slice(0, decayed), self.weight_decay)
            yield _Part(slice(decayed, numel), 0.0)


class _Part(NamedTuple):
    """A range of the flat vector that decays alike."""

    columns: slice
    weight_decay: float
