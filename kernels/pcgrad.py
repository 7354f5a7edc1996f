"""PCGrad around any torch optimizer: the interface of the widely copied class, made exact.

    optimizer = PCGrad(torch.optim.AdamW(model.parameters()))
    optimizer.zero_grad()
    optimizer.pc_backward([loss_a, loss_b, loss_c])
    optimizer.step()

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1, over all
parameters that any task reaches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .balanced_optimizer import BalancedOptimizer, Extent
from .surgery import Reduction, draw_order, pcgrad_weights
from .task_gradients import TaskGradients

_STATE_KEY = "pcgrad"


class PCGrad(BalancedOptimizer):
    """Wraps an optimizer; ``pc_backward`` takes the place of ``backward``.

    What the tasks do not share is left as it is: a parameter that no task reaches keeps ``grad``
    None, so that weight decay leaves it alone, and the mean is taken over the tasks that reach a
    parameter.

    Args:
        optimizer: any torch optimizer.
        reduction: ``"mean"`` or ``"sum"`` of the projected gradients; the paper sums.
        extent: project over the whole ``"model"`` as the paper does, within each parameter
            ``"group"`` of the optimizer, or within each ``"tensor"``.
        seed: of the random order of projections, which is a function of seed and step alone, so
            that all ranks of a distributed run draw the same.
        include_self: also project each gradient by itself where its turn comes, as the widely
            copied class does; with its order, this replays its update.
        task_gradients: as for :class:`.BalancedOptimizer`.  A layer that sees several tasks at once
            counts as reached by all of them if any loss reaches it.

    Raises:
        ValueError: an unknown ``reduction`` or ``extent``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: Reduction = "mean",
        *,
        extent: Extent = "model",
        seed: int = 0,
        include_self: bool = False,
        task_gradients: TaskGradients | None = None,
    ) -> None:
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
        super().__init__(optimizer, self._project, extent=extent, task_gradients=task_gradients)
        self._reduction: Reduction = reduction
        self._seed, self._include_self = seed, include_self
        self._draws = 0
        self._order: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state and how many orders were drawn."""
        return super().state_dict() | {_STATE_KEY: {"draws": self._draws}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state.

        Args:
            state_dict: what :meth:`state_dict` returned, here or of the optimizer alone.
        """
        own = state_dict.get(_STATE_KEY)
        self._draws = 0 if own is None else own["draws"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != _STATE_KEY})

    def pc_backward(self, objectives: Sequence[Tensor], order: Tensor | None = None) -> None:
        """Set every parameter's ``grad`` to the combination of the projected task gradients.

        Args:
            objectives: one scalar loss for each task; more as for ``backward``.
            order: ``[K, K]`` int64; row i is the sequence of tasks that g_i is projected by.  Drawn
                at random when None.

        Raises:
            ValueError: as ``backward``.
        """
        self._order = order
        try:
            self.backward(objectives)
        finally:
            self._order = None
        self._draws += order is None

    def _project(self, gram: Tensor) -> Tensor:
        if self._order is None:
            seed = torch.full((), self._seed, dtype=torch.int64, device=gram.device)
            self._order = draw_order(len(gram), seed, self._draws)
        return pcgrad_weights(
            gram,
            self._order.to(gram.device),
            reduction="sum",
            include_self=self._include_self,
        )

    def _share(self, num_tasks_reaching: int) -> float:
        return 1 / num_tasks_reaching if self._reduction == "mean" else 1.0
