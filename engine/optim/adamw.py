"""AdamW on flat parameters, fed with the task gradients and their weights.

The combined gradient ``sum_k c_k g_k`` is never stored: combining it and updating weights and
moments is one pass over memory for all parameter groups (``kernels.combine_adamw_segments_``).
"""

from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from .._kernels import kernels
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment
from .lr_factors import LrRanges


class AdamSettings(TypedDict):
    """Settings of Adam and its relatives.

    Attributes:
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
    """

    betas: tuple[float, float]
    eps: float
    weight_decay: float


class AdamW:
    """AdamW (Loshchilov and Hutter 2019), with fp32 master weights and moments.

    Args:
        parameters: what is updated; matrices decay, biases and norms do not.
        factors: on the learning rate of each stage, by its name; None or empty: 1.
        settings: see :class:`AdamSettings`.

    Attributes:
        exp_avg: ``[S]`` fp32, the first moment.
        exp_avg_sq: ``[S]`` fp32, the second.
        updates: 0-dim fp32, the steps that were not skipped.
    """

    def __init__(
        self,
        parameters: FlatParameters,
        factors: Mapping[str, float] | None = None,
        **settings: Unpack[AdamSettings],
    ) -> None:
        self.betas, self.eps = settings["betas"], settings["eps"]
        self.weight_decay = settings["weight_decay"]
        self.exp_avg = torch.zeros_like(parameters.master)
        self.exp_avg_sq = torch.zeros_like(parameters.master)
        self.updates = torch.zeros((), device=parameters.master.device)  # skipped steps excluded
        self._own = parameters.own
        self._ranges = LrRanges(parameters, factors) if factors else None

    @property
    def vectors(self) -> dict[str, Tensor]:
        """The moments, by name."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @property
    def state(self) -> dict[str, Tensor]:
        """No further state."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def step(
        self,
        weights: Tensor,
        segments: Sequence[Segment],
        *,
        lr: Tensor,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Update weights and moments with ``scale * sum_k weights[group, k] * rows[k]``.

        Args:
            weights: ``[G, K]`` fp32, for each parameter group.
            segments: which columns belong to which group.
            lr: 0-dim fp32.
            scale: 0-dim fp32, the clip factor (and the inverse of a loss scale).
            skip: 0-dim bool; true leaves weights, moments and the count of updates untouched.
        """
        self.updates += ~skip
        if self._ranges is None:
            self._update(weights, segments, lr, scale, skip)
            return
        # A launch for each factor; columns of other factors are left as they are.
        rates = self._ranges.rates(lr)
        for number, own in enumerate(self._ranges.split(segments)):
            if own:
                self._update(weights, own, rates[number], scale, skip)

    def _update(
        self, weights: Tensor, segments: Sequence[Segment], lr: Tensor, scale: Tensor, skip: Tensor
    ) -> None:
        flat = self._own
        ends, groups = _ends_and_groups(segments, len(flat.master))
        kernels.combine_adamw_segments_(
            flat.rows,
            weights,
            flat.master,
            self.exp_avg,
            self.exp_avg_sq,
            None if flat.compute is flat.master else flat.compute,
            ends=ends,
            groups=groups,
            decayed=flat.decayed,
            lr=lr,
            step=self.updates,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            scale=scale,
            skip=skip,
        )


def _ends_and_groups(segments: Sequence[Segment], total: int) -> tuple[list[int], list[int]]:
    """Return the ends of ascending segments and their groups; -1 for columns of no segment."""
    ends, groups, end = [], [], 0
    for group, columns in (*segments, Segment(-1, slice(total, total))):
        if end < columns.start:
            ends.append(columns.start)
            groups.append(-1)
        if columns.start < columns.stop:
            ends.append(columns.stop)
            groups.append(group)
        end = columns.stop
    return ends, groups
