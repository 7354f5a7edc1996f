"""Combine the gradients of several tasks into the ``grad`` of the parameters.

The task gradients are the rows of a gradient buffer ``[K, P]``; a method computes weights from the
rows' Gram matrix, and the weighted sum of the rows is added to the parameters' ``grad``.  The rows
take a backward pass for each task, or, with :class:`.TaskGradients`, one for all tasks.  Those of
several ranks are averaged during the backward passes (:mod:`.rank_exchange`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..distributed.row_averages import RowAverages
from ..registration.validation import check_data
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Losses, TaskNames
from .parameter_rows import (
    Granularity,
    ParameterGroups,
    ParameterRows,
    Trained,
    layout_of,
    rows_by_kind,
    sum_of_grams,
    trained_parameters,
)
from .rank_exchange import ChosenGroup, Examples, RankExchange, examples_by_task
from .task_differentiation import TaskDifferentiation


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
        group: the ranks whose gradients are averaged.

    Attributes:
        gram: ``[K, K]`` Gram matrix of the task gradients, after ``backward``.
        weights: ``[G, K]`` weights that were applied.
        awaits_step: whether gradients were combined since the last step.

    Raises:
        TypeError: ``collector`` is no :class:`.TaskGradients`.
        ValueError: an unknown ``granularity``, or names that are not different.
    """

    def __init__(
        self,
        granularity: Granularity,
        average: bool,
        collector: TaskGradients | None,
        tasks: Sequence[str] | None,
        group: ChosenGroup = ChosenGroup("auto"),  # noqa: B008 - of pickles before
    ) -> None:
        if granularity not in ("model", "group", "tensor"):
            raise ValueError(
                f"granularity must be 'model', 'group' or 'tensor', not {granularity!r}"
            )
        if collector is not None and not isinstance(collector, TaskGradients):
            raise TypeError(
                "task_gradients: expected kernels.TaskGradients(model, num_tasks), got "
                f"{type(collector).__name__}"
            )
        self._granularity: Granularity = granularity
        self._average, self._collector = average, collector
        self._tasks, self._group = TaskNames(tasks), group
        self.gram: Tensor | None = None
        self.weights: Tensor | None = None
        self.awaits_step = False
        self._buffers: list[ParameterRows] = []
        self._differentiation = TaskDifferentiation([])
        self._layout: list[tuple[object, ...]] = []
        self._ranks: RankExchange | None = None  # of this layout
        self._awaits_ranks = False  # whether rows hold what other ranks have not got
        self._num_tasks = 0  # of the gradients that are in the rows
        self._has_filled_rows = False
        self._present: set[int] = set()  # tasks that had a loss
        self._before: dict[int, Tensor | None] = {}  # by position, what is added to
        self._written: list[SeenGradient] = []

    def __reduce__(self) -> tuple[Any, ...]:
        if self._collector is not None:
            raise TypeError(
                "an optimizer with task_gradients cannot be copied or pickled, as those belong to "
                "one model: make TaskGradients of the other model and wrap its optimizer"
            )
        names = self._tasks.names
        return type(self), (self._granularity, self._average, None, names, self._group)

    @property
    def tasks(self) -> tuple[str, ...] | None:
        """The tasks' names, or None without."""
        return self._tasks.names

    def clear(self) -> None:
        """Forget the task gradients; the parameters' ``grad`` stays."""
        self._num_tasks = 0
        self._awaits_ranks = False
        self._has_filled_rows = False
        self._written, self._before = [], {}
        if self._collector is not None:
            self._collector.clear()

    def check_exchanged(self) -> None:
        """Refuse a step with gradients that other ranks have not got.

        Raises:
            RuntimeError: all backward passes since ``zero_grad`` were within ``no_sync``.
        """
        if self._awaits_ranks:
            raise RuntimeError(
                "step: the gradients are this rank's own, since the last backward pass was within "
                "no_sync, so weights would drift apart; leave the last one of a step outside, or "
                "train without other ranks with process_group=None"
            )

    def check_ranks(self, groups: ParameterGroups, state: Sequence[int], step: int) -> None:
        """Compare the weights of all ranks, where there are several.

        Args:
            groups: the optimizer's.
            state: further numbers that must be the same.
            step: for the message.

        Raises:
            RuntimeError: they differ.
        """
        if self._ranks is not None:
            trained = trained_parameters(groups, self._granularity)
            self._ranks.check_same([entry.parameter for entry in trained], state, step)

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
        self,
        losses: Losses,
        groups: ParameterGroups,
        weigh: Callable[[Tensor], Tensor],
        examples: Examples | None = None,
    ) -> None:
        """Add the combination of the task gradients to every parameter's ``grad``.

        Args:
            losses: one for each task.
            groups: the optimizer's.
            weigh: makes weights ``[G, K]`` out of Gram matrices ``[G, K, K]``.
            examples: of each task on this rank.

        Raises:
            ValueError: as :meth:`.BalancedOptimizer.backward`.
        """
        by_task = self._tasks.sort(losses, may_lack_all=self._group.has_several)
        counts = examples_by_task(examples, self._tasks.names, len(by_task))
        trained = list(trained_parameters(groups, self._granularity))
        is_continued = self._is_continued(trained)
        if is_continued:
            self._check_number(len(by_task))
        else:
            self._begin(trained, len(by_task))
        self._num_tasks = 0  # should anything fail, the next call begins afresh
        ranks, present = self._ranks, [loss is not None for loss in by_task]
        if ranks is not None:
            # Within no_sync, too: a few numbers, by which each micro-batch counts.
            by_task, present = ranks.share(by_task, counts, self._tasks.names, is_continued)
            self._awaits_ranks = not ranks.is_now
            ranks = ranks if ranks.is_now else None
        self._fill_rows(by_task, present, ranks)
        weights = self._balance(weigh, ranks)
        self._num_tasks, self.awaits_step = len(by_task), True
        self._write_gradients(weights)

    # ---- the rows ------------------------------------------------------------------------------

    def _is_continued(self, trained: Sequence[Trained]) -> bool:
        """Whether to add to the rows: every gradient written from them is unchanged.

        Without reading a value back this detects `zero_grad` of the optimizer, of the model and of
        the wrapped optimizer, in place or not, and any other change of gradients.
        """
        return self._is_written() and self._layout_of(trained) == self._layout

    def _layout_of(self, trained: Sequence[Trained]) -> list[tuple[object, ...]]:
        """Return what the rows depend on, and whether there are other ranks."""
        return [(self._group.has_several,), *layout_of(trained)]

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

    def _begin(self, trained: Sequence[Trained], num_tasks: int) -> None:
        """Clear the rows, and give columns to the parameters that the optimizer has now."""
        if not trained:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        collector = self._collector
        if collector is not None and num_tasks != collector.num_tasks:
            raise ValueError(f"losses must be {collector.num_tasks}, not {num_tasks}")
        layout = self._layout_of(trained)
        if layout != self._layout:
            self._buffers = list(self._new_buffers(trained))
            self._differentiation = TaskDifferentiation(self._buffers)
            self._layout = layout
            self._ranks = self._group.exchange([entry.parameter for entry in trained])
            if self._ranks is not None:
                whole = [buffer for buffer in self._buffers if buffer.sharding is None]
                self._ranks.lay_out([buffer.gradients for buffer in whole])
        if collector is None:
            for buffer in self._buffers:
                buffer.gradients.resize(num_tasks)
        elif self._has_filled_rows:  # and not only backward passes of the caller's own
            collector.clear()
        self._present = set()
        self._differentiation.reached = [set() for _ in range(num_tasks)]
        self._written, self._before = [], {}

    def _new_buffers(self, trained: Sequence[Trained]) -> Iterator[ParameterRows]:
        """Yield a buffer for each kind of parameter, or the one that collects task gradients."""
        collector = self._collector
        if collector is not None:
            own, others = {id(entry.parameter) for entry in trained}, collector.parameters
            if own != set(map(id, others)):
                raise ValueError(
                    f"the {len(own)} parameters of the optimizer that require a gradient are not "
                    f"the {len(others)} of task_gradients; make TaskGradients(module, num_tasks) "
                    "of the module whose parameters the optimizer has, and make it and the wrapper "
                    "anew after freezing or unfreezing some"
                )
            yield ParameterRows.collected(trained, collector)
            return
        yield from rows_by_kind(trained)

    def _fill_rows(
        self,
        losses: Sequence[Tensor | None],
        present: Sequence[bool],
        ranks: RankExchange | None,
    ) -> None:
        """Add the gradient of each loss to its row.

        Args:
            losses: this rank's.
            present: for each task, whether any rank has a loss.
            ranks: those to average the rows over; None for none.

        Raises:
            ValueError: no loss has a gradient, or none depends on a trained parameter.
        """
        own = {task: loss for task, loss in enumerate(losses) if loss is not None}
        tasks = [task for task, is_there in enumerate(present) if is_there]
        if not tasks:
            self._tasks.refuse_no_gradient()
        self._present.update(tasks)
        self._has_filled_rows = True
        differentiation = self._differentiation
        averages = None if ranks is None else ranks.averages
        with nullcontext() if self._ranks is None else self._ranks.passed_over():
            if self._collector is not None:
                self._collect(self._collector, list(own.values()), averages)
            elif differentiation.has_shards:
                differentiation.of_shards(own, averages)
            else:
                differentiation.of_whole(own, tasks, averages)
        if ranks is not None:
            ranks.finish(differentiation.reached)
        if not self._awaits_ranks and not any(differentiation.reached):
            raise ValueError(
                "losses: none depends on a parameter of the optimizer; make the optimizer when the "
                "model has the parameters that are to be trained"
            )

    def _collect(
        self, collector: TaskGradients, losses: list[Tensor], averages: RowAverages | None
    ) -> None:
        """Run one backward pass, in which the layers write the rows of all tasks."""
        collector.refuse_other_gradients()  # cleared since the forward pass or not
        completing = self._differentiation.completing
        try:
            with nullcontext() if averages is None else completing(losses, averages):
                if losses:
                    torch.autograd.backward(losses)
        finally:
            collector.allow_other_gradients(self._clear_if_changed)
        for entry in self._buffers[0].trained:
            for task in self._present & collector.tasks_reaching(entry.parameter):
                self._differentiation.reached[task].add(entry.position)

    # ---- their combination ---------------------------------------------------------------------

    def _balance(self, weigh: Callable[[Tensor], Tensor], ranks: RankExchange | None) -> Tensor:
        """Return the weights ``[G, K]`` of the rows."""
        grams = sum_of_grams(self._buffers)
        if self._awaits_ranks:  # a method may keep what it saw, and ranks see different gradients
            return grams.new_ones(grams.shape[:2])
        self.gram, self.weights = grams.sum(0), weigh(grams)
        if ranks is not None:
            self.weights = ranks.group.broadcast_(self.weights.contiguous())
        return self.weights

    @torch.no_grad()
    def _write_gradients(self, weights: Tensor) -> None:
        parameters = []
        for buffer in self._buffers:
            combined = buffer.combine(weights)
            for entry, slot in buffer.parameters():
                num_tasks = sum(entry.position in own for own in self._differentiation.reached)
                if num_tasks > 0:
                    gradient = buffer.gradient(entry, slot, combined)
                    self._write(entry, gradient, num_tasks if self._average else 1)
                    parameters.append(entry.parameter)
        # After all writes: views of one buffer, as gradients may be, count them together.
        self._written = [seen for p in parameters if (seen := SeenGradient.of(p)) is not None]
        for parameter in parameters:
            for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
                hook(parameter)

    def _write(self, entry: Trained, gradient: Tensor, divisor: int) -> None:
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
