"""Combine the gradients of several tasks into the ``grad`` of the parameters.

The task gradients are the rows of a gradient buffer ``[K, P]``; a method computes weights from the
rows' Gram matrix, and the weighted sum of the rows is added to the parameters' ``grad``.  The rows
take a backward pass for each task, or, with :class:`.TaskGradients`, one for all tasks.  Those of
several ranks are averaged during the backward passes (:mod:`.rank_exchange`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from ..autograd_graph import gradient_node, graph_nodes, needed_later, other_leaves
from ..distributed.sharded_tensors import Sharding, local, sharding_of
from ..gradient_buffer import GradientBuffer, Slot, lay_out
from ..registration.validation import check_data
from ..task_gradients.task_gradients import TaskGradients
from ..task_gradients.task_losses import Losses, TaskNames
from .kept_vector import KeptVector
from .rank_exchange import ChosenGroup, Examples, RankExchange, examples_by_task

Granularity = Literal["model", "group", "tensor"]
ParameterGroups = list[dict[str, Any]]


class _Trained(NamedTuple):
    """A parameter that requires a gradient."""

    position: int  # among those of the optimizer
    group: int  # number of its group, whose parameters share their weights
    parameter: Tensor


class _Buffer(NamedTuple):
    """The task gradients of parameters of one dtype and device, a slot for each.

    Of sharded parameters (DTensor), all in one way, they are those of this rank's shards.
    """

    trained: Sequence[_Trained]
    gradients: GradientBuffer
    combined: KeptVector
    sharding: Sharding | None

    @classmethod
    def of(cls, trained: Sequence[_Trained]) -> "_Buffer":
        """Give each parameter its columns; there are no rows yet."""
        shapes = {str(entry.position): local(entry.parameter).shape for entry in trained}
        slots, end = lay_out(shapes, alignment=1)
        first = trained[0].parameter
        rows = local(first).new_empty(0, end)
        gradients = GradientBuffer(slots, rows, [entry.group for entry in trained])
        return cls(trained, gradients, KeptVector(), sharding_of(first))

    @classmethod
    def collected(cls, trained: Sequence[_Trained], collector: TaskGradients) -> "_Buffer":
        """Take the rows in which one backward pass collects the gradients of all tasks."""
        entries = {id(entry.parameter): entry for entry in trained}
        ordered = [entries[id(parameter)] for parameter in collector.parameters]
        groups = [entry.group for entry in ordered]
        gradients = GradientBuffer(collector.buffer.slots, collector.rows, groups)
        return cls(ordered, gradients, KeptVector(), None)

    def parameters(self) -> Iterator[tuple[_Trained, Slot]]:
        """Yield every parameter and its columns."""
        return zip(self.trained, self.gradients.slots, strict=True)

    def combine(self, weights: Tensor) -> Tensor:
        """``[P]``: the rows combined by weights ``[G, K]``."""
        rows = self.gradients.rows
        return self.gradients.combine(weights, self.combined.take(rows, rows.shape[1]))

    def grams(self) -> Tensor:
        """``[S, K, K]``: the Gram matrix of each segment, of all shards."""
        grams = self.gradients.grams()
        return grams if self.sharding is None else self.sharding.add_shards_(grams)


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
        ValueError: an unknown ``granularity``, or names that are not different.
    """

    def __init__(
        self,
        granularity: Granularity,
        average: bool,
        collector: TaskGradients | None,
        tasks: Sequence[str] | None,
        group: ChosenGroup,
    ) -> None:
        if granularity not in ("model", "group", "tensor"):
            raise ValueError(
                f"granularity must be 'model', 'group' or 'tensor', not {granularity!r}"
            )
        self._granularity: Granularity = granularity
        self._average, self._collector = average, collector
        self._tasks, self._group = TaskNames(tasks), group
        self.gram: Tensor | None = None
        self.weights: Tensor | None = None
        self.awaits_step = False
        self._buffers: list[_Buffer] = []
        self._layout: list[tuple[object, ...]] = []
        self._ranks: RankExchange | None = None  # of this layout
        self._awaits_ranks = False  # whether rows hold what other ranks have not got
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
            parameters = [entry.parameter for entry in self._trained(groups)]
            self._ranks.check_same(parameters, state, step)

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
        trained = list(self._trained(groups))
        is_continued = self._is_continued(trained)
        if is_continued:
            self._check_number(len(by_task))
        else:
            self._begin(trained, len(by_task))
        self._num_tasks = 0  # should anything fail, the next call begins afresh
        ranks = self._ranks
        if ranks is not None and ranks.is_now:
            by_task, present = ranks.share(by_task, counts, self._tasks.names, is_continued)
            weights = self._balance(by_task, present, len(trained), weigh, ranks)
        else:
            present = [loss is not None for loss in by_task]
            weights = self._balance(by_task, present, len(trained), weigh, None)
        self._awaits_ranks = ranks is not None and not ranks.is_now
        self._num_tasks, self.awaits_step = len(by_task), True
        self._write_gradients(weights)

    def _balance(
        self,
        losses: Sequence[Tensor | None],
        present: Sequence[bool],
        num_trained: int,
        weigh: Callable[[Tensor], Tensor],
        ranks: RankExchange | None,
    ) -> Tensor:
        """Compute the task gradients; return their weights ``[G, K]``.

        Args:
            losses: this rank's.
            present: for each task, whether any rank has a loss.
            num_trained: the number of parameters.
            weigh: as for :meth:`backward`.
            ranks: those to exchange gradients with now.
        """
        if not any(present):
            self._tasks.refuse_no_gradient()
        self._present |= {task for task, is_there in enumerate(present) if is_there}
        self._has_filled_rows = True
        with nullcontext() if self._ranks is None else self._ranks.passed_over():
            self._differentiate(losses, present, ranks)
        if ranks is not None:
            self._reached = ranks.reached(self._reached, num_trained)
            ranks.average_others()
            ranks.averages.wait()
        if not any(self._reached):
            raise ValueError(
                "losses: none depends on a parameter of the optimizer; make the optimizer when the "
                "model has the parameters that are to be trained"
            )
        grams = self._sum_of_grams()
        if ranks is None and self._ranks is not None:
            # Within no_sync: a method may keep what it saw, and ranks see different gradients.
            return grams.new_ones(grams.shape[:2])
        self.gram, self.weights = grams.sum(0), weigh(grams)
        if ranks is not None:
            self.weights = ranks.group.broadcast_(self.weights.contiguous())
        return self.weights

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
        kinds: dict[tuple[object, ...], list[_Trained]] = {}
        for entry in trained:
            own = entry.parameter
            kinds.setdefault((own.dtype, own.device, sharding_of(own)), []).append(entry)
        yield from map(_Buffer.of, kinds.values())

    def _differentiate(
        self,
        losses: Sequence[Tensor | None],
        present: Sequence[bool],
        ranks: RankExchange | None,
    ) -> None:
        """Add the gradient of each loss to its row; begin to average rows over the ranks."""
        own = {task: loss for task, loss in enumerate(losses) if loss is not None}
        if self._collector is not None:
            self._collect(self._collector, list(own.values()), ranks)
        elif any(buffer.sharding is not None for buffer in self._buffers):
            self._differentiate_shards(own, ranks)
        else:
            retained = self._prepare(own)
            for task in (task for task, is_there in enumerate(present) if is_there):
                loss = own.get(task)
                if ranks is not None:
                    self._differentiate_averaged(task, loss, retained.get(task), ranks)
                elif loss is not None:
                    self._add_to_row(task, self._gradients_of(loss, retained[task]))

    def _prepare(self, losses: Mapping[int, Tensor]) -> dict[int, bool]:
        """Differentiate by what is not trained here; return for which losses to keep the graph."""
        parameters = self._parameters()
        graphs = [graph_nodes(loss) for loss in losses.values()]
        retained = needed_later(graphs)
        others = other_leaves(graphs, parameters)
        if others:  # of another optimizer, say: theirs is the gradient of the sum, as in backward
            torch.autograd.backward(list(losses.values()), retain_graph=True, inputs=others)
        return dict(zip(losses, retained, strict=True))

    def _parameters(self) -> list[Tensor]:
        """Return all parameters in the order of the buffers."""
        return [entry.parameter for buffer in self._buffers for entry in buffer.trained]

    def _gradients_of(self, loss: Tensor, retain_graph: bool) -> Sequence[Tensor | None]:
        """Return the gradients of all parameters in the order of the buffers."""
        return torch.autograd.grad(
            loss, self._parameters(), retain_graph=retain_graph, allow_unused=True
        )

    def _add_to_row(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Add a task's gradients, those of all parameters in the order of the buffers."""
        remaining = iter(gradients)
        for buffer in self._buffers:
            for entry, slot in buffer.parameters():
                self._add(task, buffer, entry, slot, next(remaining))

    def _add(
        self, task: int, buffer: _Buffer, entry: _Trained, slot: Slot, gradient: Tensor | None
    ) -> None:
        """Add one parameter's gradient of one task."""
        if gradient is None:
            return
        self._reached[task].add(entry.position)
        own = slot.view(buffer.gradients.rows[task])
        if buffer.sharding is not None:
            gradient = buffer.sharding.local_gradient(gradient)
        own += gradient.to_dense() if gradient.is_sparse else gradient

    def _differentiate_averaged(
        self, task: int, loss: Tensor | None, retain_graph: bool | None, ranks: RankExchange
    ) -> None:
        """Add a loss's gradients to its row, which leaves for the other ranks piece by piece."""
        ranks.averages.start(slice(task, task + 1))
        if loss is not None:
            with self._hooks(task, ranks):
                self._gradients_of(loss, bool(retain_graph))
        ranks.averages.finish()

    @contextmanager
    def _hooks(self, task: int, ranks: RankExchange) -> Iterator[None]:
        """Add each gradient to the row as soon as autograd has it."""

        def take(
            number: int, buffer: _Buffer, entry: _Trained, slot: Slot, gradient: Tensor
        ) -> None:
            self._add(task, buffer, entry, slot, gradient)
            ranks.averages.complete(number)

        slots = [(buffer, *pair) for buffer in self._buffers for pair in buffer.parameters()]
        handles = [
            place[1].parameter.register_hook(partial(take, number, *place))
            for number, place in enumerate(slots)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _differentiate_shards(
        self, losses: Mapping[int, Tensor], ranks: RankExchange | None
    ) -> None:
        """Take the gradients that FSDP2 leaves in ``grad``, averaged, one task after the other."""
        retained = needed_later([graph_nodes(loss) for loss in losses.values()])
        parameters = self._parameters()
        with _set_aside(parameters):
            for (task, loss), retain in zip(losses.items(), retained, strict=True):
                torch.autograd.backward(loss, retain_graph=retain)
                self._add_to_row(task, [parameter.grad for parameter in parameters])
                for parameter in parameters:
                    parameter.grad = None
        if ranks is not None:
            ranks.averages.start(slice(None))
            ranks.averages.finish()

    def _collect(
        self, collector: TaskGradients, losses: list[Tensor], ranks: RankExchange | None
    ) -> None:
        collector.refuse_other_gradients()  # cleared since the forward pass or not
        try:
            with nullcontext() if ranks is None else self._completed_in(ranks):
                if losses:
                    torch.autograd.backward(losses)
        finally:
            collector.allow_other_gradients(self._clear_if_changed)
        for entry in self._buffers[0].trained:
            for task in self._present & collector.tasks_reaching(entry.parameter):
                self._reached[task].add(entry.position)

    @contextmanager
    def _completed_in(self, ranks: RankExchange) -> Iterator[None]:
        """Send columns of all rows once every layer with their parameters has written them.

        Autograd visits a parameter's own node last, even where layers give it no gradient.
        """
        nodes = [gradient_node(parameter) for parameter in self._parameters()]
        ranks.averages.start(slice(None))
        handles = [
            node.register_hook(lambda *_, number=number: ranks.averages.complete(number))
            for number, node in enumerate(nodes)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        ranks.averages.finish()

    # ---- their combination ---------------------------------------------------------------------

    def _sum_of_grams(self) -> Tensor:
        """``[G, K, K]``: the Gram matrix of each group."""
        buffers = [buffer.gradients for buffer in self._buffers]
        members = [segment.group for buffer in buffers for segment in buffer.segments]
        grams_of_buffers = [buffer.grams() for buffer in self._buffers]
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
                    gradient = _strided_like(local(entry.parameter), slot.view(combined))
                    # `data`: later writes are counted for each gradient by itself.
                    gradient = gradient.data
                    if buffer.sharding is not None:
                        gradient = buffer.sharding.wrap(gradient, entry.parameter)
                    self._write(entry, gradient, num_tasks if self._average else 1)
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


@contextmanager
def _set_aside(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Free the parameters' ``grad`` for gradients of single tasks, and what is called with them."""
    before = [(p, p.grad, p._post_accumulate_grad_hooks) for p in parameters]
    for parameter in parameters:
        parameter.grad = None
        parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for parameter, gradient, hooks in before:
            parameter.grad, parameter._post_accumulate_grad_hooks = gradient, hooks


def _strided_like(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Give a gradient the parameter's strides, as autograd does; fused optimizers rely on them."""
    return gradient if parameter.is_contiguous() else torch.empty_like(parameter).copy_(gradient)


def _layout_of(trained: Sequence[_Trained]) -> list[tuple[object, ...]]:
    """Return what the rows depend on; buffers keep parameters, and so their `id`, alive."""
    return [(*numbers, id(p), p.shape, p.dtype, p.device) for *numbers, p in trained]
