"""Gradients of several tasks, combined into the ``grad`` of the parameters.

The gradients of the single tasks lie in the rows of a buffer ``[K, P]``; a method makes weights out
of the rows' Gram matrix, and the weighted sum of the rows is added to the parameters' ``grad``.
The rows take a backward pass for each task, or, with :class:`.TaskGradients`, one for all of them.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..registration.validation import check_data
from ..surgery.surgery import combine, gram
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Losses, TaskNames

Extent = Literal["model", "group", "tensor"]
ParameterGroups = list[dict[str, Any]]


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
        """Hold the gradients of ``num_tasks`` tasks, all zero."""
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


class SeenGradient(NamedTuple):
    """A parameter's gradient as it was at a moment; writes into it make another version."""

    parameter: Tensor
    gradient: TensorWeakRef
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> "SeenGradient | None":
        """Note a parameter's gradient, without keeping it alive; None without one."""
        gradient = parameter.grad
        if gradient is None:
            return None
        return cls(parameter, TensorWeakRef(gradient), gradient._version)

    def is_there(self) -> bool:
        """Whether the parameter still has this gradient, changed or not."""
        gradient = self.gradient()
        return gradient is not None and gradient is self.parameter.grad

    def is_untouched(self) -> bool:
        """Whether the parameter has this gradient as it was."""
        gradient = self.parameter.grad
        return self.is_there() and gradient is not None and gradient._version == self.version


class BalancedGradients:
    """Makes and combines the gradients of K tasks, for :class:`.BalancedOptimizer`.

    A copy, or one that was pickled, has the settings and no gradients.

    Args:
        extent: what gets weights of its own: ``"model"``, ``"group"`` or ``"tensor"``.
        average: divide by the number of tasks that reach a parameter.
        collector: collects the gradients of all tasks in one backward pass.
        tasks: the tasks' names.

    Attributes:
        gram: ``[K, K]`` Gram matrix of the task gradients, after ``backward``.
        weights: ``[G, K]`` weights that were applied.
        awaits_step: whether gradients were combined since the last step.

    Raises:
        ValueError: an unknown ``extent``, or names that are not different.
    """

    def __init__(
        self,
        extent: Extent,
        average: bool,
        collector: TaskGradients | None,
        tasks: Sequence[str] | None,
    ) -> None:
        if extent not in ("model", "group", "tensor"):
            raise ValueError(f"extent must be 'model', 'group' or 'tensor', not {extent!r}")
        self._extent: Extent = extent
        self._average, self._collector = average, collector
        self._tasks = TaskNames(tasks)
        self.gram: Tensor | None = None
        self.weights: Tensor | None = None
        self.awaits_step = False
        self._buffers: list[_Buffer] = []
        self._layout: list[tuple[object, ...]] = []
        self._num_tasks = 0  # of the gradients that are in the rows
        self._has_filled_rows = False
        self._present: set[int] = set()  # tasks that had a loss
        self._reached: list[set[int]] = []  # for each task, positions of parameters
        self._before: dict[int, Tensor | None] = {}  # by position, what is added to
        self._written: list[SeenGradient] = []

    def __reduce__(self) -> tuple[Any, ...]:
        if self._collector is not None:
            raise TypeError(
                "an optimizer with task_gradients cannot be copied or pickled, as those belong to "
                "one model: make TaskGradients of the other model and wrap its optimizer"
            )
        return type(self), (self._extent, self._average, None, self._tasks.names)

    def clear(self) -> None:
        """Forget the task gradients; the parameters' ``grad`` stays."""
        self._num_tasks = 0
        self._has_filled_rows = False
        self._written, self._before = [], {}
        if self._collector is not None:
            self._collector.clear()

    def end_step(self) -> None:
        """Note that the optimizer has done a step; gradients that follow are of another."""
        self.awaits_step = False
        if self._collector is not None:
            self._collector.allow_other_gradients(self._forget_what_is_gone)

    def are_foreign(self, groups: ParameterGroups) -> bool:
        """Whether there are gradients, and none of them was combined here since the last step.

        Args:
            groups: the optimizer's.
        """
        if self.awaits_step or any(written.is_there() for written in self._written):
            return False
        return any(p.grad is not None for group in groups for p in group["params"])

    def backward(
        self, losses: Losses, groups: ParameterGroups, weigh: Callable[[Tensor], Tensor]
    ) -> None:
        """Add the combination of the task gradients to every parameter's ``grad``.

        Args:
            losses: one for each task.
            groups: the optimizer's.
            weigh: makes weights ``[G, K]`` out of Gram matrices ``[G, K, K]``.

        Raises:
            ValueError: as :meth:`.BalancedOptimizer.backward`.
        """
        by_task = self._tasks.sort(losses)
        trained = list(self._trained(groups))
        if self._goes_on(trained):
            self._check_number(len(by_task))
        else:
            self._begin(trained, len(by_task))
        self._num_tasks = 0  # should anything fail, the next call begins afresh
        self._differentiate(by_task)
        if not any(self._reached):
            raise ValueError(
                "losses: none depends on a parameter of the optimizer; make the optimizer when the "
                "model has the parameters that are to be trained"
            )
        grams = self._sum_of_grams()
        self.gram, self.weights = grams.sum(0), weigh(grams)
        self._num_tasks, self.awaits_step = len(by_task), True
        self._write_gradients(self.weights)

    def _trained(self, groups: ParameterGroups) -> Iterator[tuple[int, int, Tensor]]:
        """Yield position, number of the set balanced with, and parameter."""
        position = 0
        for group_number, group in enumerate(groups):
            for parameter in group["params"]:
                balanced_with = {"model": 0, "group": group_number, "tensor": position}
                if parameter.requires_grad:
                    yield position, balanced_with[self._extent], parameter
                    position += 1

    # ---- the rows ------------------------------------------------------------------------------

    def _goes_on(self, trained: Sequence[tuple[int, int, Tensor]]) -> bool:
        """Whether to add to the rows: all that came of them is still there, as it was written.

        Without reading a value back this tells `zero_grad` of the optimizer, of the model and of
        the optimizer inside, in place or not, and whatever else changes gradients.
        """
        return self._is_written() and _layout_of(trained) == self._layout

    def _is_written(self) -> bool:
        return self._num_tasks > 0 and all(seen.is_untouched() for seen in self._written)

    def _forget_what_is_gone(self) -> None:
        """Clear the collected rows, before more of them come, if what came of them is gone."""
        if self._has_filled_rows and not self._is_written():
            self.clear()

    def _check_number(self, num_tasks: int) -> None:
        if num_tasks != self._num_tasks:
            raise ValueError(f"losses must be {self._num_tasks} until zero_grad, not {num_tasks}")
        if num_tasks == 1 and self._tasks.names is None:
            raise ValueError(
                "losses: one loss, and one before it since zero_grad; give the losses of all tasks "
                "in one call, or each by its name ({'a': loss}), with tasks=[…] where the "
                "optimizer is wrapped"
            )

    def _begin(self, trained: Sequence[tuple[int, int, Tensor]], num_tasks: int) -> None:
        """Clear the rows, laid out for the parameters that the optimizer has now."""
        if not trained:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        collector = self._collector
        if collector is not None and num_tasks != collector.num_tasks:
            raise ValueError(f"losses must be {collector.num_tasks}, not {num_tasks}")
        layout = _layout_of(trained)
        if layout != self._layout:
            self._buffers = list(self._lay_out(trained))
            self._layout = layout
            _warn_of_other_processes()
        if collector is None:
            for buffer in self._buffers:
                buffer.resize(num_tasks)
        elif self._has_filled_rows:  # and not only backward passes of the caller's own
            collector.clear()
        self._present = set()
        self._reached = [set() for _ in range(num_tasks)]
        self._written, self._before = [], {}

    def _lay_out(self, trained: Sequence[tuple[int, int, Tensor]]) -> Iterator[_Buffer]:
        """Yield a buffer for each kind of parameter, or the one that collects task gradients."""
        collector = self._collector
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

    def _places(self) -> Iterator[tuple[_Buffer, _Place]]:
        for buffer in self._buffers:
            for place in buffer.places:
                yield buffer, place

    def _differentiate(self, losses: Sequence[Tensor | None]) -> None:
        """Add the gradient of each loss to its row."""
        present = {task: loss for task, loss in enumerate(losses) if loss is not None}
        self._present |= present.keys()
        self._has_filled_rows = True
        if self._collector is not None:
            self._collect(self._collector, list(present.values()))
            return
        parameters = [place.parameter for _, place in self._places()]
        graphs = [_graph_nodes(loss) for loss in present.values()]
        retained = _needed_later(graphs)
        others = _other_leaves(graphs, parameters)
        if others:  # of another optimizer, say: theirs is the gradient of the sum, as in backward
            torch.autograd.backward(list(present.values()), retain_graph=True, inputs=others)
        for (task, loss), retain in zip(present.items(), retained, strict=True):
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=retain, allow_unused=True
            )
            for (buffer, place), gradient in zip(self._places(), gradients, strict=True):
                if gradient is None:
                    continue
                self._reached[task].add(place.position)
                if gradient.is_sparse:
                    gradient = gradient.to_dense()
                buffer.rows[task, place.columns] += gradient.reshape(-1)

    def _collect(self, collector: TaskGradients, losses: list[Tensor]) -> None:
        collector.refuse_other_gradients()  # cleared since the forward pass or not
        try:
            torch.autograd.backward(losses)
        finally:
            collector.allow_other_gradients(self._forget_what_is_gone)
        for _, place in self._places():
            for task in self._present & collector.tasks_reaching(place.parameter):
                self._reached[task].add(place.position)

    # ---- their combination ---------------------------------------------------------------------

    def _sum_of_grams(self) -> Tensor:
        """``[G, K, K]``: the Gram matrix of each set that gets weights of its own."""
        members = [segment.balanced_with for buffer in self._buffers for segment in buffer.segments]
        parts = [buffer.grams() for buffer in self._buffers]
        first = max(parts, key=lambda matrix: torch.finfo(matrix.dtype).bits)
        grams = torch.cat([matrix.to(first) for matrix in parts])
        if members == [0]:
            return grams
        sets = first.new_zeros(max(members) + 1, *grams.shape[1:])
        index = torch.tensor(members).to(first.device, non_blocking=True)
        return sets.index_add_(0, index, grams)

    @torch.no_grad()
    def _write_gradients(self, weights: Tensor) -> None:
        parameters = []
        for buffer in self._buffers:
            combined = buffer.combine(weights)
            for place in buffer.places:
                num_tasks = sum(place.position in reached for reached in self._reached)
                if num_tasks > 0:
                    gradient = _laid_out_like(place.parameter, combined[place.columns])
                    # `data`: later writes are counted for each gradient by itself.
                    self._write(place, gradient.data, num_tasks if self._average else 1)
                    parameters.append(place.parameter)
        # After all writes: views of one buffer, as gradients may be, count them together.
        self._written = [seen for p in parameters if (seen := SeenGradient.of(p)) is not None]
        for parameter in parameters:
            for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)

    def _write(self, place: _Place, gradient: Tensor, divisor: int) -> None:
        """Add a gradient to what was there before the first call; like autograd, in place."""
        if divisor != 1:
            gradient /= divisor
        old = place.parameter.grad
        check_data(grad=old)
        if place.position not in self._before:
            self._before[place.position] = None if old is None else old.detach().clone()
        before = self._before[place.position]
        if before is not None:
            gradient = gradient + before  # in the wider of their dtypes
        if old is None or old.layout != torch.strided:
            place.parameter.grad = gradient
        else:
            old.copy_(gradient)


def _warn_of_other_processes() -> None:
    """Say that nothing goes between processes: hooks of wrappers for that are not called."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"losses: the gradients are this process's own, of {dist.get_world_size()}, as "
            "DistributedDataParallel is passed over; average each `grad` over the processes before "
            "`step`, dist.all_reduce(p.grad, dist.ReduceOp.AVG), or their weights drift apart",
            stacklevel=5,
        )


def _laid_out_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Give a gradient the parameter's strides, as autograd does; fused optimizers rely on them."""
    gradient = values.view_as(parameter)
    return gradient if parameter.is_contiguous() else torch.empty_like(parameter).copy_(gradient)


def _layout_of(trained: Sequence[tuple[int, int, Tensor]]) -> list[tuple[object, ...]]:
    """What the rows depend on; buffers keep parameters, and so their `id`, alive."""
    return [(*numbers, id(p), p.shape, p.dtype, p.device) for *numbers, p in trained]


def _needed_later(graphs: Sequence[set[Any]]) -> list[bool]:
    """Whether a later loss shares a node with each loss, by the nodes of their graphs.

    Raises:
        ValueError: a part of the graph is made in the backward pass only.
    """
    later: set[Any] = set()
    needed = []
    for nodes in reversed(graphs):
        if any(node.name() == "CheckpointFunctionBackward" for node in nodes):
            raise ValueError(
                "losses: they went through torch.utils.checkpoint with use_reentrant=True, which "
                "hides the parameters inside from a gradient of each task; give use_reentrant=False"
            )
        needed.append(not later.isdisjoint(nodes))
        later |= nodes
    return needed[::-1]


def _other_leaves(graphs: Iterable[set[Any]], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that the losses depend on besides ``parameters``, each once."""
    known = {id(parameter) for parameter in parameters}
    parents = {parent for nodes in graphs for node in nodes for parent in _parents(node)}
    leaves = [n.variable for n in parents if n.name() == "torch::autograd::AccumulateGrad"]
    return [leaf for leaf in leaves if id(leaf) not in known]


def _parents(node: Any) -> list[Any]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def _graph_nodes(loss: Tensor) -> set[Any]:
    """All nodes between a loss and its leaves; a leaf's own node keeps nothing that is freed."""
    nodes: set[Any] = set()
    open_nodes = [loss.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in nodes or not node.next_functions:
            continue
        nodes.add(node)
        open_nodes.extend(_parents(node))
    return nodes
