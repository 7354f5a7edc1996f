"""The K task gradients of any torch BERT from one ordinary backward pass.

    task_gradients = TaskGradients(model, num_tasks=3)
    optimizer = PCGrad(torch.optim.AdamW(model.parameters()), task_gradients=task_gradients)

    optimizer.zero_grad()
    with task_gradients.batch([32, 32, 32]):                  # examples of each task, joined
        pooled = model.bert(input_ids, attention_mask).pooler_output
        losses = []
        for k, own in enumerate(pooled.split([32, 32, 32])):
            with task_gradients.task(k):                      # a head that sees one task only
                losses.append(loss_of[k](model.heads[k](own), labels[k]))
    optimizer.pc_backward(losses)                             # one backward pass
    optimizer.step()

Examples do not interact, so one backward pass computes the input gradients of all tasks, and only
the weight gradients are computed by task.  Each use of a parameter counts, whatever module owns it:
tied weights, modules called twice and functional calls are collected too.
"""

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.rank_group import RankGroup
from ..distributed.row_averages import RowAverages
from ..distributed.sharded_tensors import sharding_of
from ..gradient_buffer import GradientBuffer, lay_out
from .batch_division import Joined, Single
from .parameter_places import Place
from .task_layers import TaskLayers


class TaskGradients:
    """The gradients of K tasks, which backward passes collect in the rows of a flat buffer.

    It follows the parameters that require a gradient when it is made; the others are left to
    autograd.  Task gradients add up over backward passes (micro-batches) until :meth:`clear`; the
    parameters' own ``grad`` does not change.  Under autocast the layers compute as usual, and the
    rows have the dtype of the parameters.  Activation checkpointing needs
    ``checkpoint(…, use_reentrant=False, context_fn=task_gradients.checkpoint_contexts)``; that of
    transformers' models, ``gradient_checkpointing_enable()``, gets it by itself.  On several
    processes the model may be wrapped by DistributedDataParallel, or by nothing; sharded parameters
    (FSDP, tensor parallelism) are refused.

    Args:
        model: any module.  Within :meth:`batch` its trained parameters are used by linear, layer
            norm and embedding layers, torch's or this package's, with the batch along the first
            dimension; within :meth:`task` by any operation.
        num_tasks: K.

    Attributes:
        num_tasks: K.
        parameters: those that are followed, in the order of their columns.
        buffer: the task gradients, with the columns of each parameter.  Every parameter starts at a
            multiple of 64 columns, the gaps are zero.

    Raises:
        ValueError: no task, nothing to train, or parameters of several dtypes or devices.
        NotImplementedError: parameters are sharded, by FSDP2 or tensor parallelism.
    """

    def __init__(self, model: nn.Module, num_tasks: int) -> None:
        if num_tasks < 1:
            raise ValueError(f"num_tasks: expected at least 1, got {num_tasks}")
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _check_whole(model)
        kinds = {f"{p.dtype} on {p.device}" for p in named.values()}
        if len(kinds) != 1:
            raise ValueError(
                "model: expected parameters to train, all of one dtype and on one device, got "
                + (", ".join(sorted(kinds)) or "none")
            )
        self.num_tasks, self.parameters = num_tasks, tuple(named.values())
        slots, end = lay_out({name: parameter.shape for name, parameter in named.items()})
        self.buffer = GradientBuffer(slots, self.parameters[0].detach().new_zeros(num_tasks, end))
        self._reached = torch.zeros(len(slots), num_tasks, dtype=torch.int64)
        # `data`: writes are not counted as those of `rows`, which may be saved.  One tensor for all
        # parameters: torch.compile takes several to be apart.
        buffer = self.rows.data
        self._places: dict[int, Place] = {}
        for number, (slot, parameter) in enumerate(zip(slots, self.parameters, strict=True)):
            place = Place(slot, buffer, set(), number, self._reached)
            self._places[id(parameter)] = place
            parameter.register_hook(_refusal(slot.name, weakref.ref(self)))
        self._layers = TaskLayers(self._places)
        self._model = weakref.ref(model)
        self._collecting = False
        self._before_next: weakref.WeakMethod[Callable[[], None]] | None = None

    @property
    def rows(self) -> Tensor:
        """``[K, P]``; row k is the gradient of task k."""
        return self.buffer.rows

    @contextmanager
    def batch(self, examples: Iterable[int], tokens: Iterable[int] | None = None) -> Iterator[None]:
        """Run the forward pass of a batch that joins the tasks along the first dimension.

        Args:
            examples: how many examples each task has, in the order in which they lie.
            tokens: how many tokens each task has, where layers work on a packed stream of them.  An
                accelerated model finds them itself.  Given packed inputs it reads them, which on a
                GPU waits for the device and breaks a graph of torch.compile; given these numbers,
                as `PackingCollator.token_counts` tells them, neither happens.  They are compared
                with the model's where that waits for nothing: not in graphs, and on a GPU within
                `kernels.checked_values` only.

        Raises:
            ValueError: not K numbers, or a model that was moved or cast; within the block, a layer
                that does not have the batch along the first dimension of its input.
            NotImplementedError: within the block, a parameter used by any other kind of layer,
                which :meth:`task` takes; the message names it.
        """
        offsets = self._offsets("examples", examples)
        of_tokens = None if tokens is None else self._offsets("tokens", tokens)
        with self._seen_as(Joined.of(offsets, of_tokens, tokens is not None)):
            yield

    @contextmanager
    def task(self, number: int) -> Iterator[None]:
        """Run layers that see one task only, such as its head.

        They are of any kind, and their inputs have any shape: what autograd finds for a parameter
        that any operation uses here is the gradient of this task.  An autograd function of one's
        own, and what runs inside torch.func.vmap, is given ``parameter.view_as(parameter)``, since
        torch does not tell of its arguments.

        Args:
            number: the task, from 0.

        Raises:
            ValueError: there is no such task, or the model was moved or cast.
        """
        if not 0 <= number < self.num_tasks:
            raise ValueError(f"number: expected 0 to {self.num_tasks - 1}, got {number}")
        with self._seen_as(Single(number, self.num_tasks)):
            yield

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], ...]:
        """Return the contexts that ``context_fn`` of ``torch.utils.checkpoint`` has to return.

        Layers that run again in the backward pass, which is called after the block, then use the
        division into tasks of this moment.
        """
        tasks = self._layers.tasks
        return nullcontext(), nullcontext() if tasks is None else self._again(tasks)

    def refuse_other_gradients(self) -> None:
        """Make a gradient that belongs to no task an error.

        :meth:`batch` and :meth:`task` do so; until then, and after :meth:`clear` or
        :meth:`allow_other_gradients`, a backward pass is the caller's own.
        """
        self._collecting = True

    def allow_other_gradients(self, before_next: Callable[[], None]) -> None:
        """Leave backward passes to the caller until the next :meth:`batch` or :meth:`task`.

        Args:
            before_next: a method that is called there, for as long as its object exists.
        """
        self._collecting = False
        self._before_next = weakref.WeakMethod(before_next)

    def clear(self) -> None:
        """Set all task gradients to zero, for the next step."""
        self.buffer.resize(self.num_tasks)
        self._collecting, self._before_next = False, None
        self._reached.zero_()
        for place in self._places.values():
            place.tasks.clear()

    def average_over_ranks(self, group: "dist.ProcessGroup | None" = None) -> None:
        """Average the rows over ranks; what losses reach on any rank counts as reached.

        PCGrad and BalancedOptimizer do so by themselves.  Who uses the rows without them calls it
        on all ranks behind the backward pass, which is within ``no_sync`` of
        DistributedDataParallel, as that has no other gradient to average.

        Args:
            group: the ranks; the default process group when None.

        Raises:
            RuntimeError: no process group is initialised.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "average_over_ranks: no process group is initialised; call "
                "torch.distributed.init_process_group, or leave this out in one process"
            )
        ranks = RankGroup(dist.group.WORLD if group is None else group)
        averages = RowAverages([self.buffer], ranks)
        averages.start(slice(None))
        averages.finish()
        for place in self._places.values():
            self._reached[place.number, list(place.tasks)] = 1
        self._reached.copy_(ranks.any_(self._reached.to(torch.uint8)))
        averages.wait()

    def named_views(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every parameter's name and its view of the rows, ``[K, *shape]``."""
        for place in self._places.values():
            yield place.name, place.rows

    def columns(self, parameter: Tensor) -> slice:
        """Return the columns of the rows that belong to a parameter.

        Args:
            parameter: one of :attr:`parameters`.

        Raises:
            ValueError: it is none.
        """
        columns = self._place(parameter).slot.columns
        return slice(columns.start, columns.stop)

    def tasks_reaching(self, parameter: Tensor) -> frozenset[int]:
        """Return the tasks whose losses have reached a parameter since :meth:`clear`.

        A layer that sees several tasks at once and is reached by any loss counts for all of them.

        Args:
            parameter: one of :attr:`parameters`.

        Raises:
            ValueError: it is none.
        """
        place = self._place(parameter)
        flags = self._reached[place.number].tolist()
        return frozenset(place.tasks) | {task for task, flag in enumerate(flags) if flag}

    def _place(self, parameter: Tensor) -> Place:
        if id(parameter) not in self._places:
            raise ValueError("parameter: none of the model's that required a gradient at first")
        return self._places[id(parameter)]

    def _offsets(self, argument: str, sizes: Iterable[int]) -> tuple[int, ...]:
        sizes = list(sizes)
        if len(sizes) != self.num_tasks or any(size < 0 for size in sizes):
            raise ValueError(
                f"{argument}: expected {self.num_tasks} counts, one for each task, got {sizes}"
            )
        return tuple(accumulate(sizes, initial=0))

    def _check_kinds(self) -> None:
        """Refuse a model that was moved, cast or sharded after the rows were made for it."""
        _check_whole(self._model())
        made_for = f"{self.rows.dtype} on {self.rows.device}"
        for place, parameter in zip(self._places.values(), self.parameters, strict=True):
            if (parameter.dtype, parameter.device) != (self.rows.dtype, self.rows.device):
                raise ValueError(
                    f"{place.name}: now {parameter.dtype} on {parameter.device}, but {made_for} "
                    "when TaskGradients was made; make it after the model is moved and cast"
                )

    @contextmanager
    def _seen_as(self, tasks: Joined | Single) -> Iterator[None]:
        if self._layers.tasks is None:
            self._check_kinds()
        outer, self._layers.tasks = self._layers.tasks, tasks
        self._begin_collecting()
        try:
            with self._outermost() if outer is None else nullcontext():
                yield
        finally:
            self._layers.tasks = outer

    @contextmanager
    def _outermost(self) -> Iterator[None]:
        with self._layers, following_checkpoints(self._model(), self.checkpoint_contexts):
            yield

    def _begin_collecting(self) -> None:
        before = None if self._collecting or self._before_next is None else self._before_next()
        if before is not None:
            before()
        self.refuse_other_gradients()

    @contextmanager
    def _again(self, tasks: Joined | Single) -> Iterator[None]:
        if self._layers.tasks is not None:
            raise RuntimeError("with activation checkpointing, call backward after the block")
        with self._seen_as(tasks):
            yield


def _check_whole(model: nn.Module | None) -> None:
    """Refuse a model with sharded parameters.

    Raises:
        NotImplementedError: it has some; the message names one.
    """
    for name, parameter in () if model is None else model.named_parameters():
        if sharding_of(parameter) is not None:
            raise NotImplementedError(
                f"{name}: is sharded (FSDP2, or a DTensor of tensor parallelism), and layers write "
                "the task gradients of whole parameters only; leave out task_gradients, which "
                "PCGrad does not need, or use DistributedDataParallel"
            )


@contextmanager
def following_checkpoints(model: nn.Module | None, contexts: Callable[[], Any]) -> Iterator[None]:
    """Let the layers that transformers' models checkpoint run again in the contexts of now.

    Args:
        model: whose modules may checkpoint, as ``gradient_checkpointing_enable()`` sets them up.
        contexts: the ``context_fn`` that their calls of ``torch.utils.checkpoint`` get within the
            block, where they have none.
    """
    before: list[tuple[Any, Any]] = []
    for module in () if model is None else model.modules():
        run = vars(module).get("_gradient_checkpointing_func")
        if not isinstance(run, functools.partial) or run.keywords.get("use_reentrant", True):
            continue
        if "context_fn" not in run.keywords:
            before.append((module, run))
    for module, run in before:
        module._gradient_checkpointing_func = functools.partial(_checkpoint, run, contexts)
    try:
        yield
    finally:
        for module, run in before:
            module._gradient_checkpointing_func = run


@torch.compiler.disable(
    reason="layers that are checkpointed while task gradients are collected cannot be compiled"
)
def _checkpoint(
    run: Callable[..., Any], contexts: Callable[[], Any], *args: Any, **kwargs: Any
) -> Any:
    """Call ``torch.utils.checkpoint`` with a ``context_fn``."""
    return run(*args, context_fn=contexts, **kwargs)


def _refusal(name: str, owner: "weakref.ref[TaskGradients]") -> Callable[[Tensor | None], None]:
    """Make the hook that refuses a gradient of a parameter that was used outside any task."""

    def refuse(gradient: Tensor | None) -> None:
        task_gradients = owner()
        if gradient is not None and task_gradients is not None and task_gradients._collecting:
            raise RuntimeError(
                f"{name}: got a gradient that belongs to no task; it was used outside `batch` and "
                "`task`, or by an autograd function of its own or torch.func, which take "
                "`parameter.view_as(parameter)` within `task`"
            )

    return refuse
