"""PCGrad around any torch optimizer: the interface of the widely copied class, made exact.

    optimizer = PCGrad(torch.optim.AdamW(model.parameters()))
    optimizer.zero_grad()
    optimizer.pc_backward([loss_a, loss_b, loss_c])
    optimizer.step()

Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1, over all
parameters that any task reaches.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .surgery import Reduction, combine, draw_order, gram, pcgrad_weights

_STATE_KEY = "pcgrad"


class _Place(NamedTuple):
    """Where one parameter's gradients lie in the rows of a buffer."""

    parameter: Tensor
    position: int  # of the parameter in the optimizer
    columns: slice


class _Buffer:
    """Task gradients ``[K, P]`` of all parameters of one dtype and device."""

    def __init__(self, parameters: Sequence[tuple[int, Tensor]]) -> None:
        self.places: list[_Place] = []
        end = 0
        for index, parameter in parameters:
            begin, end = end, end + parameter.numel()
            self.places.append(_Place(parameter, index, slice(begin, end)))
        self._columns = end
        self.rows = parameters[0][1].new_empty(0, end)

    def resize(self, num_tasks: int) -> None:
        """Make room for the gradients of ``num_tasks`` tasks, all zero."""
        if len(self.rows) == num_tasks:
            self.rows.zero_()
        else:
            self.rows = self.rows.new_zeros(num_tasks, self._columns)


class PCGrad(torch.optim.Optimizer):
    """Wraps an optimizer; ``pc_backward`` takes the place of ``backward``.

    It is an optimizer itself: learning-rate schedulers and ``torch.amp.GradScaler`` take it.

    What the tasks do not share is left as it is: a parameter that no task reaches keeps ``grad``
    None, so that weight decay leaves it alone, and the mean is taken over the tasks that reach a
    parameter.

    Args:
        optimizer: any torch optimizer.
        reduction: ``"mean"`` or ``"sum"`` of the projected gradients; the paper sums.
        seed: of the random order of projections, which is a function of seed and step alone, so
            that all ranks of a distributed run draw the same.
        include_self: also project each gradient by itself where its turn comes, as the widely
            copied class does; with its order, this replays its update.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        reduction: Reduction = "mean",
        *,
        seed: int = 0,
        include_self: bool = False,
    ) -> None:
        # The base class would set up parameter groups of its own; these are the optimizer's.
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction must be 'sum' or 'mean', not {reduction!r}")
        self.optimizer = optimizer
        self.gram: Tensor | None = None
        """``[K, K]`` Gram matrix of the task gradients, after ``pc_backward``."""
        self._reduction: Reduction = reduction
        self._seed, self._include_self = seed, include_self
        self._draws = 0
        self._buffers: list[_Buffer] = []
        self._num_tasks = 0
        self._reached: list[set[int]] = []

    # ---- the optimizer's own -------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The optimizer's default settings."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state and how many orders were drawn."""
        return self.optimizer.state_dict() | {_STATE_KEY: {"draws": self._draws}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; the optimizer's alone is taken as well."""
        own = state_dict.get(_STATE_KEY)
        self._draws = 0 if own is None else own["draws"]
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != _STATE_KEY})

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those of the single tasks included."""
        self._num_tasks = 0
        self.optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do a step of the optimizer."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    # ---- gradient surgery ----------------------------------------------------------------------

    def pc_backward(self, objectives: Sequence[Tensor], order: Tensor | None = None) -> None:
        """Set every parameter's ``grad`` to the combination of the projected task gradients.

        Called again before ``zero_grad`` (gradient accumulation), it adds to the gradients of the
        single tasks and combines them anew.  The graph of a loss is freed as soon as no later loss
        needs it.

        Args:
            objectives: one scalar loss for each task.
            order: ``[K, K]`` int64; row i is the sequence of tasks that g_i is projected by.  Drawn
                at random when None.

        Raises:
            ValueError: if there is no loss, one is not a scalar, or their number changed since
                ``zero_grad``.
        """
        if not objectives or any(loss.numel() != 1 for loss in objectives):
            raise ValueError("objectives must be one or more scalar losses")
        if self._num_tasks not in (0, len(objectives)):
            raise ValueError(
                f"objectives must be {self._num_tasks} losses until zero_grad, "
                f"not {len(objectives)}"
            )
        if self._num_tasks == 0:
            self._begin(len(objectives))
        self._differentiate(objectives)
        self.gram = self._sum_of_grams()
        if order is None:
            seed = torch.full((), self._seed, dtype=torch.int64, device=self.gram.device)
            order = draw_order(len(objectives), seed, self._draws)
            self._draws += 1
        weights = pcgrad_weights(
            self.gram, order.to(self.gram.device), reduction="sum", include_self=self._include_self
        )
        self._write_gradients(weights)

    def _begin(self, num_tasks: int) -> None:
        """Lay out the rows for the parameters that the optimizer has now."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        trained = [(i, p) for i, p in enumerate(parameters) if p.requires_grad]
        laid_out = [place.parameter for buffer in self._buffers for place in buffer.places]
        if {id(p) for _, p in trained} != {id(p) for p in laid_out}:
            kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = {}
            for index, parameter in trained:
                kinds.setdefault((parameter.dtype, parameter.device), []).append((index, parameter))
            self._buffers = [_Buffer(alike) for alike in kinds.values()]
        if not self._buffers:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        for buffer in self._buffers:
            buffer.resize(num_tasks)
        self._num_tasks = num_tasks
        self._reached = [set() for _ in range(num_tasks)]

    def _places(self) -> Iterator[tuple[_Buffer, _Place]]:
        for buffer in self._buffers:
            for place in buffer.places:
                yield buffer, place

    def _differentiate(self, objectives: Sequence[Tensor]) -> None:
        """Add the gradient of each loss to its row."""
        parameters = [place.parameter for _, place in self._places()]
        for task, (loss, retain) in enumerate(
            zip(objectives, _needed_later(objectives), strict=True)
        ):
            gradients = torch.autograd.grad(
                loss.reshape(()), parameters, retain_graph=retain, allow_unused=True
            )
            for (buffer, place), gradient in zip(self._places(), gradients, strict=True):
                if gradient is None:
                    continue
                self._reached[task].add(place.position)
                if gradient.is_sparse:
                    gradient = gradient.to_dense()
                buffer.rows[task, place.columns] += gradient.reshape(-1)

    def _sum_of_grams(self) -> Tensor:
        grams = [gram(buffer.rows) for buffer in self._buffers]
        first = max(grams, key=lambda matrix: torch.finfo(matrix.dtype).bits)
        return torch.stack([matrix.to(first) for matrix in grams]).sum(0)

    @torch.no_grad()
    def _write_gradients(self, weights: Tensor) -> None:
        for buffer in self._buffers:
            exact = buffer.rows.dtype == torch.float64
            combined = combine(
                buffer.rows,
                weights.to(buffer.rows.device, torch.float64 if exact else torch.float32),
            )
            for parameter, index, columns in buffer.places:
                tasks = sum(index in reached for reached in self._reached)
                if tasks == 0:
                    continue
                gradient = combined[columns].view_as(parameter)
                if self._reduction == "mean" and tasks > 1:
                    gradient /= tasks
                parameter.grad = gradient


def _needed_later(losses: Sequence[Tensor]) -> list[bool]:
    """Whether a later loss shares a node of the graph with each loss."""
    later: set[Any] = set()
    needed = []
    for loss in reversed(losses):
        nodes = _graph_nodes(loss)
        needed.append(not later.isdisjoint(nodes))
        later |= nodes
    return needed[::-1]


def _graph_nodes(loss: Tensor) -> set[Any]:
    """All nodes between a loss and its leaves; a leaf's own node keeps nothing that is freed."""
    nodes: set[Any] = set()
    open_nodes = [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in nodes or not node.next_functions:
            continue
        nodes.add(node)
        open_nodes.extend(parent for parent, _ in node.next_functions)
    return nodes
