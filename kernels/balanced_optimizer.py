"""Any balancing method around any torch optimizer.

    optimizer = BalancedOptimizer(torch.optim.AdamW(model.parameters()), balancing.cagrad)
    optimizer.zero_grad()
    optimizer.backward([loss_a, loss_b, loss_c])
    optimizer.step()

The gradients of the single tasks lie in the rows of a buffer ``[K, P]``; a method makes weights out
of the rows' Gram matrix, and the weighted sum of the rows becomes the parameters' ``grad``.  The
rows take a backward pass for each task, or, with :class:`.TaskGradients`, one for all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .surgery import combine, gram
from .task_gradients import TaskGradients

Extent = Literal["model", "group", "tensor"]
Method = Callable[[Tensor], Tensor]
"""``gram [K, K] -> weights [K]``, as in :mod:`.balancing` or TorchJD's weightings."""


class _Place(NamedTuple):
    """Where one parameter's gradients lie in the rows of a buffer."""

    parameter: Tensor
    position: int  # of the parameter in the optimizer
    balanced_with: int  # number of the set of parameters that get their weights together
    columns: slice


class _Segment(NamedTuple):
    """Neighbouring columns of a buffer that get the same weights."""

    balanced_with: int
    columns: slice


class _Buffer:
    """Task gradients ``[K, P]`` of all parameters of one dtype and device, in ascending columns."""

    def __init__(self, places: Sequence[_Place], rows: Tensor) -> None:
        self.places, self.rows = places, rows
        self.segments: list[_Segment] = []
        for balanced_with, own in groupby(places, key=lambda place: place.balanced_with):
            columns = [place.columns for place in own]
            self.segments.append(_Segment(balanced_with, slice(columns[0].start, columns[-1].stop)))

    @classmethod
    def of_parameters(cls, parameters: Sequence[tuple[int, int, Tensor]]) -> "_Buffer":
        """Lay out position, set balanced with, and parameter side by side; no rows yet."""
        places = []
        end = 0
        for position, balanced_with, parameter in parameters:
            begin, end = end, end + parameter.numel()
            places.append(_Place(parameter, position, balanced_with, slice(begin, end)))
        return cls(places, parameters[0][-1].new_empty(0, end))

    def resize(self, num_tasks: int) -> None:
        """Make room for the gradients of ``num_tasks`` tasks, all zero."""
        if len(self.rows) == num_tasks:
            self.rows.zero_()
        else:
            self.rows = self.rows.new_zeros(num_tasks, self.rows.shape[1])

    def grams(self) -> Tensor:
        """``[S, K, K]``, of each segment."""
        offsets = [0, *(segment.columns.stop for segment in self.segments)]
        return gram(self.rows, offsets)

    def combine(self, weights: Tensor) -> Tensor:
        """``[P]``: every segment combined by its row of ``weights``."""
        exact = self.rows.dtype == torch.float64
        weights = weights.to(self.rows.device, torch.float64 if exact else torch.float32)
        if len(self.segments) == 1:
            return combine(self.rows, weights[self.segments[0].balanced_with])
        combined = self.rows.new_empty(self.rows.shape[1])
        for balanced_with, columns in self.segments:
            combine(self.rows[:, columns], weights[balanced_with], combined[columns])
        return combined


class BalancedOptimizer(torch.optim.Optimizer):
    """Wraps an optimizer; its ``backward(losses)`` takes the place of ``loss.backward()``.

    It is an optimizer itself: learning-rate schedulers and ``torch.amp.GradScaler`` take it.
    A parameter that no task reaches keeps ``grad`` None, so that weight decay leaves it alone.

    Args:
        optimizer: any torch optimizer.
        method: a function of the Gram matrix from :mod:`kernels.balancing`, or a TorchJD weighting
            of Gramians.
        extent: what gets weights of its own: the whole ``"model"``, each parameter ``"group"`` of
            the optimizer (a layer, say), or each ``"tensor"``.
        task_gradients: made of the model whose parameters the optimizer trains; the losses then
            come from a forward pass within its ``batch``, and ``backward`` is one backward pass.

    Attributes:
        optimizer: the wrapped one.
        gram: ``[K, K]`` Gram matrix of the task gradients, after ``backward``.
        weights: ``[G, K]`` weights that were applied, a row for each of the G groups or tensors.

    Raises:
        ValueError: an unknown ``extent``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: Method,
        *,
        extent: Extent = "model",
        task_gradients: TaskGradients | None = None,
    ) -> None:
        # The base class would set up parameter groups of its own; these are the optimizer's.
        if extent not in ("model", "group", "tensor"):
            raise ValueError(f"extent must be 'model', 'group' or 'tensor', not {extent!r}")
        self.optimizer = optimizer
        self.gram: Tensor | None = None
        self.weights: Tensor | None = None
        self._method, self._extent, self._task_gradients = method, extent, task_gradients
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
        """Add a parameter group to the optimizer.

        Args:
            param_group: as torch's optimizers take it.
        """
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state.

        Args:
            state_dict: what :meth:`state_dict` returned.
        """
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, those of the single tasks included.

        Args:
            set_to_none: of the parameters' ``grad``, instead of zeros.
        """
        self._num_tasks = 0
        if self._task_gradients is not None:
            self._task_gradients.clear()
        self.optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do a step of the optimizer.

        Args:
            closure: computes the loss again, for optimizers that ask for it.

        Returns:
            What the closure returned, or None without one.
        """
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    # ---- task gradients and their combination --------------------------------------------------

    def backward(self, losses: Sequence[Tensor]) -> None:
        """Set every parameter's ``grad`` to the weighted sum of the task gradients.

        Called again before ``zero_grad`` (gradient accumulation), it adds to the gradients of the
        single tasks and combines them anew.  The graph of a loss is freed as soon as no later loss
        needs it.

        Args:
            losses: one scalar loss for each task.

        Raises:
            ValueError: if there is no loss, one is not a scalar, their number changed since
                ``zero_grad``, or they or the optimizer's parameters are not those of
                ``task_gradients``.
        """
        if not losses or any(loss.numel() != 1 for loss in losses):
            raise ValueError("losses must be one or more scalars, one for each task")
        if self._num_tasks not in (0, len(losses)):
            raise ValueError(f"losses must be {self._num_tasks} until zero_grad, not {len(losses)}")
        if self._num_tasks == 0:
            self._begin(len(losses))
        self._differentiate(losses)
        grams = self._sum_of_grams()
        self.gram = grams.sum(0)
        self.weights = torch.stack([self._method(matrix) for matrix in grams])
        self._write_gradients(self.weights)

    def _share(self, _num_tasks_reaching: int) -> float:
        """Factor on the gradient of a parameter that so many tasks reach."""
        return 1.0

    def _begin(self, num_tasks: int) -> None:
        """Lay out the rows for the parameters that the optimizer has now."""
        trained = list(self._trained())
        laid_out = [place.parameter for _, place in self._places()]
        if {id(parameter) for *_, parameter in trained} != {id(p) for p in laid_out}:
            self._buffers = list(self._lay_out(trained))
        if not self._buffers:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        if self._task_gradients is None:
            for buffer in self._buffers:
                buffer.resize(num_tasks)
        elif num_tasks != self._task_gradients.num_tasks:
            raise ValueError(f"losses must be {self._task_gradients.num_tasks}, not {num_tasks}")
        self._num_tasks = num_tasks
        self._reached = [set() for _ in range(num_tasks)]

    def _lay_out(self, trained: Sequence[tuple[int, int, Tensor]]) -> Iterator[_Buffer]:
        """Yield a buffer for each kind of parameter, or the one that collects task gradients."""
        collector = self._task_gradients
        if collector is not None:
            if {id(entry[-1]) for entry in trained} != {id(p) for p in collector.parameters}:
                raise ValueError(
                    "the optimizer's parameters that require a gradient are not those of "
                    "task_gradients"
                )
            places = [
                _Place(parameter, position, balanced_with, collector.columns(parameter))
                for position, balanced_with, parameter in trained
            ]
            yield _Buffer(sorted(places, key=lambda place: place.columns.start), collector.rows)
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[tuple[int, int, Tensor]]] = {}
        for entry in trained:
            kinds.setdefault((entry[-1].dtype, entry[-1].device), []).append(entry)
        yield from map(_Buffer.of_parameters, kinds.values())

    def _trained(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield position, number of the set balanced with, and parameter."""
        position = 0
        for group_number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                balanced_with = {"model": 0, "group": group_number, "tensor": position}
                if parameter.requires_grad:
                    yield position, balanced_with[self._extent], parameter
                    position += 1

    def _places(self) -> Iterator[tuple[_Buffer, _Place]]:
        for buffer in self._buffers:
            for place in buffer.places:
                yield buffer, place

    def _differentiate(self, losses: Sequence[Tensor]) -> None:
        """Add the gradient of each loss to its row."""
        if self._task_gradients is not None:
            torch.autograd.backward(list(losses))
            for _, place in self._places():
                for task in self._task_gradients.tasks_reaching(place.parameter):
                    self._reached[task].add(place.position)
            return
        parameters = [place.parameter for _, place in self._places()]
        for task, (loss, retain) in enumerate(zip(losses, _needed_later(losses), strict=True)):
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
        """``[G, K, K]``: the Gram matrix of each set that gets weights of its own."""
        members = [segment.balanced_with for buffer in self._buffers for segment in buffer.segments]
        parts = [buffer.grams() for buffer in self._buffers]
        first = max(parts, key=lambda matrix: torch.finfo(matrix.dtype).bits)
        grams = torch.cat([matrix.to(first) for matrix in parts])
        if len(grams) == 1:
            return grams
        sets = first.new_zeros(max(members) + 1, *grams.shape[1:])
        return sets.index_add_(0, torch.tensor(members, device=first.device), grams)

    @torch.no_grad()
    def _write_gradients(self, weights: Tensor) -> None:
        for buffer in self._buffers:
            combined = buffer.combine(weights)
            for parameter, position, _, columns in buffer.places:
                num_tasks = sum(position in reached for reached in self._reached)
                if num_tasks == 0:
                    continue
                gradient = combined[columns].view_as(parameter)
                share = self._share(num_tasks)
                if share != 1.0:
                    gradient *= share
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
