"""PCGrad around any torch optimizer: the interface of the widely copied class, made exact.

    optimizer = PCGrad(torch.optim.AdamW(model.parameters()))
    optimizer.zero_grad()
    optimizer.pc_backward([loss_a, loss_b, loss_c])
    optimizer.step()

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1, over all
parameters that any task reaches.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..balancing.pcgrad import Reduction, draw_order, pcgrad_weights
from ..registration.deprecation import renamed_argument
from ..registration.validation import check_order
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Losses
from .balanced_gradients import BalancedGradients
from .balanced_optimizer import BalancedOptimizer
from .parameter_rows import Granularity
from .rank_exchange import ChosenGroup, Examples, ProcessGroup

_DRAWN = "drawn_orders"  # in the first parameter group: all that stores optimizers keeps it there
_OLD_KEY = "pcgrad"  # of state dicts before


class PCGrad(BalancedOptimizer):
    """An optimizer with PCGrad around another; ``pc_backward`` replaces ``backward``.

    A parameter that no task reaches keeps its ``grad``, usually None, so that weight decay does not
    change it, and the mean is taken over the tasks that reach a parameter.  Several processes, with
    DistributedDataParallel, FSDP2 or no wrapper, average the gradient of each task before it is
    projected, and do one step together, as :class:`.BalancedOptimizer` says.

    Args:
        optimizer: any torch optimizer.  The number of orders drawn so far is an entry
            ``drawn_orders`` of its first parameter group.
        reduction: ``"mean"`` or ``"sum"`` of the projected gradients; the paper sums.
        granularity: project over the whole ``"model"`` as the paper does, within each parameter
            ``"group"`` of the optimizer, or within each ``"tensor"``.
        seed: of the random order of projections, which is a function of seed and number of the
            draw alone.  All ranks draw the same order, and project the task gradients that were
            averaged over them (``process_group``).
        include_self: also project each gradient by itself at its place in the order, as the widely
            copied class does; with that class's order, the update is the same.
        task_gradients: as for :class:`.BalancedOptimizer`.  A layer that sees several tasks at once
            counts as reached by all of them that have a loss if any loss reaches it.
        tasks: the tasks' names, for losses by name; those of the first losses when None.
        process_group: as for :class:`.BalancedOptimizer`.
        check_ranks_every: as for :class:`.BalancedOptimizer`; seed and number of orders are
            compared, too.
        extent: the old name of ``granularity``, deprecated.

    Raises:
        TypeError: ``optimizer``, ``process_group`` or ``task_gradients`` is none.
        ValueError: an unknown ``reduction`` or ``granularity``, a name twice, or a negative
            ``check_ranks_every``.
    """

    _backward_name = "pc_backward"
    _settings = ("optimizer", "_gradients", "_check_ranks_every", "_seed", "_include_self")

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: Reduction = "mean",
        *,
        granularity: Granularity = "model",
        seed: int = 0,
        include_self: bool = False,
        task_gradients: TaskGradients | None = None,
        tasks: Sequence[str] | None = None,
        process_group: ProcessGroup = "auto",
        check_ranks_every: int = 100,
        extent: Granularity | None = None,
    ) -> None:
        if extent is not None:
            granularity = renamed_argument("extent", extent, "granularity", granularity, "model")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
        group, average = ChosenGroup(process_group), reduction == "mean"
        gradients = BalancedGradients(granularity, average, task_gradients, tasks, group)
        self._set_up(optimizer, gradients, check_ranks_every)
        self._seed, self._include_self = seed, include_self
        self._first_group.setdefault(_DRAWN, 0)

    @property
    def _first_group(self) -> dict[str, Any]:
        return self.param_groups[0]

    def _load(self, state_dict: dict[str, Any]) -> None:
        old = state_dict.get(_OLD_KEY, {"draws": 0})
        super()._load({key: value for key, value in state_dict.items() if key != _OLD_KEY})
        self._first_group.setdefault(_DRAWN, old["draws"])

    def pc_backward(
        self,
        objectives: Losses,
        order: Tensor | None = None,
        *,
        examples: Examples | None = None,
    ) -> None:
        """Add the combination of the projected task gradients to every parameter's ``grad``.

        Args:
            objectives: one scalar loss for each task; more as for ``backward``, which it is but for
                the order.
            order: ``[K, K]`` int64; row i is the sequence of tasks that g_i is projected by, each
                of them once.  Drawn at random when None.
            examples: as for ``backward``.

        Raises:
            TypeError: ``order`` is no tensor.
            ValueError: as ``backward``, or an order on a CPU is not as above.
        """
        weigh = self._weigh if order is None else partial(self._project_by, order)
        self._gradients.backward(objectives, self.param_groups, weigh, examples)

    def _state_of_order(self) -> list[int]:
        return [self._seed, self._first_group.get(_DRAWN, 0)]

    def _weigh(self, grams: Tensor) -> Tensor:
        seed = torch.full((), self._seed, dtype=torch.int64, device=grams.device)
        drawn = self._first_group.get(_DRAWN, 0)
        self._first_group[_DRAWN] = drawn + 1
        return self._project(draw_order(grams.shape[-1], seed, drawn), grams)

    def _project_by(self, order: Tensor, grams: Tensor) -> Tensor:
        check_order(order, grams.shape[-1])
        return self._project(order, grams)

    def _project(self, order: Tensor, grams: Tensor) -> Tensor:
        """Make weights ``[G, K]`` out of ``[G, K, K]``."""
        order = order.to(grams.device, non_blocking=True)
        return pcgrad_weights(grams, order, include_self=self._include_self)
