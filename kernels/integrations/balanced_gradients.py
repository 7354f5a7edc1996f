"""Combine the gradients of several tasks into the ``grad`` of the parameters.

The task gradients are the rows of a gradient buffer ``[K, P]``; a method computes weights from the
rows' Gram matrix, and the weighted sum of the rows is added to the parameters' ``grad``.  The rows
take a backward pass for each task, or, with :class:`.TaskGradients`, one for all tasks.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..autograd_graph import graph_nodes, needed_later, other_leaves
from ..gradient_buffer import GradientBuffer, Slot, lay_out
from ..registration.validation import check_data
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Losses, TaskNames
from .kept_vector import KeptVector

Granularity = Literal["model", "group", "tensor"]
ParameterGroups = list[dict[str, Any]]


class _Trained(NamedTuple):
    """A parameter that requires a gradient."""

    position: int  # among those of the optimizer
    group: int  # number of its group, whose parameters share their weights
    parameter: Tensor


class _Buffer(NamedTuple):
    """The task gradients of parameters of one dtype and device, a slot for each."""

    trained: Sequence[_Trained]
    gradients: GradientBuffer
    combined: KeptVector

    @classmethod
    def of(cls, trained: Sequence[_Trained]) -> "_Buffer":
        """Give each parameter its columns; there are no rows yet."""
        shapes = {str(entry.position): entry.parameter.shape for entry in trained}
        slots, end = lay_out(shapes, alignment=1)
        rows = trained[0].parameter.new_empty(0, end)
        gradients = GradientBuffer(slots, rows, [entry.group for entry in trained])
        return cls(trained, gradients, KeptVector())

    @classmethod
    def collected(cls, trained: Sequence[_Trained], collector: TaskGradients) -> "_Buffer":
        """Take the rows in which one backward pass collects the gradients of all tasks."""
        entries = {id(entry.parameter): entry for entry in trained}
        ordered = [entries[id(parameter)] for parameter in collector.parameters]
        groups = [entry.group for entry in ordered]
        gradients = GradientBuffer(collector.buffer.slots, collector.rows, groups)
        return cls(ordered, gradients, KeptVector())

    def parameters(self) -> Iterator[tuple[_Trained, Slot]]:
        """Yield every parameter and its columns."""
        return zip(self.trained, self.gradients.slots, strict=True)

    def combine(self, weights: Tensor) -> Tensor:
        """``[P]``: the rows combined by weights ``[G, K]``."""
        rows = self.gradients.rows
        return self.gradients.combine(weights, self.combined.take(rows, rows.shape[1]))


class SeenGradient(NamedTuple):
    """A parameter's gradient and the version of its data, which later writes increase."""

    parameter: Tensor
    gradient: TensorWeakRef
    version: int

    @classmethod
    def of(cls, parameter: Tensor) -> "SeenGradient | None":
        """Record a parameter's gradient, without keeping it alive; None without one."""
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
    """The gradients of K tasks and their combination, for :class:`.BalancedOptimizer`.

    A copy, or one that was pickled, has the settings and no gradients.

    Args:
        granularity: the parameters that are balanced together: ``"model"``, ``"group"`` or
            ``"tensor"``.
        average: divide by the number of tasks that reach a parameter.
        collector: collects the gradients of all tasks in one backward pass.
        tasks: the tasks' names.

    Attributes:
        gram: ``[K, K]`` Gram matrix of the task gradients, after ``backward``.
        weights: ``[G, K]`` weights that were applied.
        awaits_step: whether gradients were combined since the last step.

    Raises:
        ValueError: an unknown ``granularity``, or names that are not different.
    """

    def __init__(
        self,
        granularity: Granularity,
        average: bool,
        collector: TaskGradients | None,
        tasks: Sequence[str] | None,
    ) -> None:
        if granularity not in ("model", "group", "tensor"):
            raise ValueError(
                f"granularity must be 'model', 'group' or 'tensor', not {granularity!r}"
            )
        self._granularity: Granularity = granularity
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
        return type(self), (self._granularity, self._average, None, self._tasks.names)

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """The tasks' names, or None without."""
        return self._tasks.names

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
            self._collector.allow_other_gradients(self._clear_if_changed)

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
        if self._is_continued(trained):
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

    def _trained(self, groups: ParameterGroups) -> Iterator[_Trained]:
        position = 0
        for group_number, group in enumerate(groups):
            for parameter in group["params"]:
                balanced_with = {"model": 0, "group": group_number, "tensor": position}
                if parameter.requires_grad:
                    yield _Trained(position, balanced_with[self._granularity], parameter)
                    position += 1

    # ---- the rows ------------------------------------------------------------------------------

    def _is_continued(self, trained: Sequence[_Trained]) -> bool:
        """Whether to add to the rows: every gradient written from them is unchanged.

        Without reading a value back this detects `zero_grad` of the optimizer, of the model and of
        the wrapped optimizer, in place or not, and any other change of gradients.
        """
        return self._is_written() and _layout_of(trained) == self._layout

    def _is_written(self) -> bool:
        return self._num_tasks > 0 and all(seen.is_untouched() for seen in self._written)

    def _clear_if_changed(self) -> None:
        """Clear the collected rows before new ones, if the gradients written from them changed."""
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

    def _begin(self, trained: Sequence[_Trained], num_tasks: int) -> None:
        """Clear the rows, and give columns to the parameters that the optimizer has now."""
        if not trained:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        collector = self._collector
        if collector is not None and num_tasks != collector.num_tasks:
            raise ValueError(f"losses must be {collector.num_tasks}, not {num_tasks}")
        layout = _layout_of(trained)
        if layout != self._layout:
            self._buffers = list(self._new_buffers(trained))
            self._layout = layout
            _warn_of_other_processes()
        if collector is None:
            for buffer in self._buffers:
                buffer.gradients.resize(num_tasks)
        elif self._has_filled_rows:  # and not only backward passes of the caller's own
            collector.clear()
        self._present = set()
        self._reached = [set() for _ in range(num_tasks)]
        self._written, self._before = [], {}

    def _new_buffers(self, trained: Sequence[_Trained]) -> Iterator[_Buffer]:
        """Yield a buffer for each kind of parameter, or the one that collects task gradients."""
        collector = self._collector
        if collector is not None:
            if {id(entry.parameter) for entry in trained} != set(map(id, collector.parameters)):
                raise ValueError(
                    "the optimizer's parameters that require a gradient are not those of "
                    "task_gradients"
                )
            yield _Buffer.collected(trained, collector)
            return
        kinds: dict[tuple[torch.dtype, torch.device], list[_Trained]] = {}
        for entry in trained:
            kinds.setdefault((entry.parameter.dtype, entry.parameter.device), []).append(entry)
        yield from map(_Buffer.of, kinds.values())

    def _differentiate(self, losses: Sequence[Tensor | None]) -> None:
        """Add the gradient of each loss to its row."""
        present = {task: loss for task, loss in enumerate(losses) if loss is not None}
        self._present |= present.keys()
        self._has_filled_rows = True
        if self._collector is not None:
            self._collect(self._collector, list(present.values()))
            return
        parameters = [entry.parameter for buffer in self._buffers for entry in buffer.trained]
        graphs = [graph_nodes(loss) for loss in present.values()]
        retained = needed_later(graphs)
        others = other_leaves(graphs, parameters)
        if others:  # of another optimizer, say: theirs is the gradient of the sum, as in backward
            torch.autograd.backward(list(present.values()), retain_graph=True, inputs=others)
        for (task, loss), retain in zip(present.items(), retained, strict=True):
            gradients = torch.autograd.grad(
                loss, parameters, retain_graph=retain, allow_unused=True
            )
            self._add_to_row(task, gradients)

    def _add_to_row(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Add a task's gradients, those of all parameters in the order of the buffers."""
        remaining = iter(gradients)
        for buffer in self._buffers:
            row = buffer.gradients.rows[task]
            for entry, slot in buffer.parameters():
                gradient = next(remaining)
                if gradient is not None:
                    self._reached[task].add(entry.position)
                    own = slot.view(row)
                    own += gradient.to_dense() if gradient.is_sparse else gradient

    def _collect(self, collector: TaskGradients, losses: list[Tensor]) -> None:
        collector.refuse_other_gradients()  # cleared since the forward pass or not
        try:
            torch.autograd.backward(losses)
        finally:
            collector.allow_other_gradients(self._clear_if_changed)
        for entry in self._buffers[0].trained:
            for task in self._present & collector.tasks_reaching(entry.parameter):
                self._reached[task].add(entry.position)

    # ---- their combination ---------------------------------------------------------------------

    def _sum_of_grams(self) -> Tensor:
        """``[G, K, K]``: the Gram matrix of each group."""
        buffers = [buffer.gradients for buffer in self._buffers]
        members = [segment.group for buffer in buffers for segment in buffer.segments]
        grams_of_buffers = [buffer.grams() for buffer in buffers]
        first = max(grams_of_buffers, key=lambda matrix: torch.finfo(matrix.dtype).bits)
        grams = torch.cat([matrix.to(first) for matrix in grams_of_buffers])
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
            for entry, slot in buffer.parameters():
                num_tasks = sum(entry.position in reached for reached in self._reached)
                if num_tasks > 0:
                    gradient = _strided_like(entry.parameter, slot.view(combined))
                    # `data`: later writes are counted for each gradient by itself.
                    self._write(entry, gradient.data, num_tasks if self._average else 1)
                    parameters.append(entry.parameter)
        # After all writes: views of one buffer, as gradients may be, count them together.
        self._written = [seen for p in parameters if (seen := SeenGradient.of(p)) is not None]
        for parameter in parameters:
            for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)

    def _write(self, entry: _Trained, gradient: Tensor, divisor: int) -> None:
        """Add a gradient to the one from before the first call; like autograd, in place."""
        if divisor != 1:
            gradient /= divisor
        parameter, position = entry.parameter, entry.position
        old = parameter.grad
        check_data(grad=old)
        if position not in self._before:
            self._before[position] = None if old is None else old.detach().clone()
        before = self._before[position]
        if before is not None:
            gradient = gradient + before  # in the wider of their dtypes
        if old is None or old.layout != torch.strided:
            parameter.grad = gradient
        else:
            old.copy_(gradient)


def _warn_of_other_processes() -> None:
    """Warn that gradients are not synchronised between processes: wrappers' hooks do not run."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        warnings.warn(
            f"losses: the gradients are this process's own, of {dist.get_world_size()}, as "
            "DistributedDataParallel is passed over; average each `grad` over the processes before "
            "`step`, dist.all_reduce(p.grad, dist.ReduceOp.AVG), or their weights drift apart",
            stacklevel=5,
        )


def _strided_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the parameter's strides, as autograd does; fused optimizers rely on them."""
    return gradient if parameter.is_contiguous() else torch.empty_like(parameter).copy_(gradient)


def _layout_of(trained: Sequence[_Trained]) -> list[tuple[object, ...]]:
    """Return what the rows depend on; buffers keep parameters, and so their `id`, alive."""
    return [(*numbers, id(p), p.shape, p.dtype, p.device) for *numbers, p in trained]
