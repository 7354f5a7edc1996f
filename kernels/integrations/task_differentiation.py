"""Differentiate the losses of several tasks into the rows of their parameters.

One backward pass for each loss, whose gradients are added to its row: of whole parameters as
autograd returns them, of shards (FSDP2) as their wrapper leaves them in ``grad``.  On several ranks
rows leave for the others as they are completed.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..autograd_graph import gradient_node, graph_nodes, needed_later, other_leaves
from ..distributed.row_averages import RowAverages
from ..gradient_buffer import Slot
from .parameter_rows import ParameterRows, Trained


class TaskDifferentiation:
    """Backward passes of several losses by the same parameters.

    Args:
        buffers: the parameters and their rows.

    Attributes:
        parameters: all of them in the order of the buffers.
        reached: for each task the positions of the parameters that its losses have reached.
    """

    def __init__(self, buffers: Sequence[ParameterRows]) -> None:
        self._buffers = buffers
        self.parameters = [entry.parameter for buffer in buffers for entry in buffer.trained]
        self.reached: list[set[int]] = []

    @property
    def has_shards(self) -> bool:
        """Whether parameters are sharded."""
        return any(buffer.sharding is not None for buffer in self._buffers)

    def of_whole(
        self, losses: Mapping[int, Tensor], tasks: Sequence[int], averages: RowAverages | None
    ) -> None:
        """Differentiate by whole parameters.

        Args:
            losses: by task.
            tasks: those of which any rank has a loss, ascending.
            averages: of the rows over ranks; None: the rows stay this rank's own.
        """
        graphs = [graph_nodes(loss) for loss in losses.values()]
        retained = dict(zip(losses, needed_later(graphs), strict=True))
        others = other_leaves(graphs, self.parameters)
        if others:  # of another optimizer, say: theirs is the gradient of the sum, as in backward
            torch.autograd.backward(list(losses.values()), retain_graph=True, inputs=others)
        for task in tasks:
            loss = losses.get(task)
            if averages is not None:
                averages.start(slice(task, task + 1))
                if loss is not None:
                    with self._adding_to_row(task, loss, averages):
                        self._gradients(loss, retained[task])
                averages.finish()
            elif loss is not None:
                self._add_to_row(task, self._gradients(loss, retained[task]))

    def of_shards(self, losses: Mapping[int, Tensor], averages: RowAverages | None) -> None:
        """Take the gradients that FSDP2 leaves in ``grad``, averaged, one task after the other.

        Args:
            losses: by task, on all ranks of the same tasks.
            averages: of the rows of parameters that are whole, or None.
        """
        retained = needed_later([graph_nodes(loss) for loss in losses.values()])
        with _set_aside(self.parameters):
            for (task, loss), retain in zip(losses.items(), retained, strict=True):
                torch.autograd.backward(loss, retain_graph=retain)
                self._add_to_row(task, [parameter.grad for parameter in self.parameters])
                for parameter in self.parameters:
                    parameter.grad = None
        if averages is not None:
            averages.start(slice(None))
            averages.finish()

    @contextmanager
    def completing(self, losses: Sequence[Tensor], averages: RowAverages) -> Iterator[None]:
        """Send columns of all rows once every layer with their parameters has written them.

        Autograd visits a parameter's own node last, even where layers give it no gradient.

        Args:
            losses: whose backward pass runs within the block.
            averages: of the rows over ranks.
        """
        nodes = [gradient_node(parameter) for parameter in self.parameters]
        outer = _BackwardPass(losses)

        def note(_inputs: Any, _outputs: Any, number: int) -> None:
            if outer.is_running():
                averages.complete(number)

        averages.start(slice(None))
        handles = [
            node.register_hook(partial(note, number=number)) for number, node in enumerate(nodes)
        ]
        with _removed_behind([*outer.handles, *handles]):
            yield
        averages.finish()

    def _gradients(self, loss: Tensor, retain_graph: bool) -> Sequence[Tensor | None]:
        return torch.autograd.grad(
            loss, self.parameters, retain_graph=retain_graph, allow_unused=True
        )

    def _columns(self) -> Iterator[tuple[ParameterRows, Trained, Slot]]:
        """Yield all parameters with their columns."""
        for buffer in self._buffers:
            for entry, slot in buffer.parameters():
                yield buffer, entry, slot

    def _add_to_row(self, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Add a task's gradients, those of all parameters."""
        for place, gradient in zip(self._columns(), gradients, strict=True):
            if gradient is not None:
                self._add(task, *place, gradient)

    def _add(
        self, task: int, buffer: ParameterRows, entry: Trained, slot: Slot, gradient: Tensor
    ) -> None:
        self.reached[task].add(entry.position)
        own = slot.view(buffer.gradients.rows[task])
        if buffer.sharding is not None:
            gradient = buffer.sharding.local_gradient(gradient)
        own += gradient.to_dense() if gradient.is_sparse else gradient

    @contextmanager
    def _adding_to_row(self, task: int, loss: Tensor, averages: RowAverages) -> Iterator[None]:
        """Add each gradient to the row, which leaves piece by piece, as soon as autograd has it."""
        outer = _BackwardPass([loss])

        def take(
            gradient: Tensor | None, number: int, place: tuple[ParameterRows, Trained, Slot]
        ) -> None:
            if not outer.is_running():
                return
            if gradient is not None:  # as of an output of DistributedDataParallel that is not used
                self._add(task, *place, gradient)
            averages.complete(number)

        handles = [
            place[1].parameter.register_hook(partial(take, number=number, place=place))
            for number, place in enumerate(self._columns())
        ]
        with _removed_behind([*outer.handles, *handles]):
            yield


class _BackwardPass:
    """Tells a backward pass of some losses from those that functions run within it.

    Hooks of parameters are called in both, in the inner ones with parts of their gradients.

    Args:
        losses: of the pass; at least one.

    Attributes:
        handles: of hooks on the losses, the first ones that a pass calls.
    """

    def __init__(self, losses: Sequence[Tensor]) -> None:
        self._number = -1
        self.handles = [loss.register_hook(self._note) for loss in losses]

    def is_running(self) -> bool:
        """Whether a hook is called by this pass itself."""
        return self._number == torch._C._current_graph_task_id()

    def _note(self, _gradient: Tensor) -> None:
        self._number = torch._C._current_graph_task_id()


@contextmanager
def _removed_behind(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
