"""AdamW on flat parameters, fed with the task gradients and their weights.

The combined gradient ``sum_k c_k g_k`` is never stored: combining it and updating weights and
moments is one pass over memory for all parameter groups (``kernels.combine_adamw_segments_``).
"""

from collections.abc import Sequence
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from .._kernels import kernels
from ..gradients.flat_parameters import FlatParameters
from ..gradients.groups import Segment


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
        settings: see :class:`AdamSettings`.
    """

    def __init__(self, parameters: FlatParameters, **settings: Unpack[AdamSettings]) -> None:
        self.betas, self.eps = settings["betas"], settings["eps"]
        self.weight_decay = settings["weight_decay"]
        self.exp_avg = torch.zeros_like(parameters.master)
        self.exp_avg_sq = torch.zeros_like(parameters.master)
        self.updates = torch.zeros((), device=parameters.master.device)  # skipped steps excluded
        self._own = parameters.own

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
        flat = self._own
        self.updates += ~skip
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
