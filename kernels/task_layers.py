"""The layers of any model, as they run while task gradients are collected.

:class:`TaskLayers` is a torch function mode: within its ``with`` block every torch call passes
through it.  Calls of linear, layer norm and embedding that take a followed parameter run as the
functions of this package that write task rows; any other use of one is refused by name, since the
gradients of the tasks could not be told apart there.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from .embedding import embedding
from .layer_norm import layer_norm
from .linear import linear
from .task_rows import Columns, TaskRows, TaskSegments, rows_at


class Place(NamedTuple):
    """Where one parameter's task gradients lie.

    Attributes:
        name: of the parameter in its model.
        buffer: ``[K, P]``.
        columns: of the buffer.
        tasks: whose losses have reached the parameter since the rows were cleared.
    """

    name: str
    buffer: Tensor
    columns: Columns
    tasks: set[int]

    @property
    def rows(self) -> Tensor:
        """``[K, *shape]``, the gradients."""
        return rows_at(self.buffer, *self.columns)


class Joined(NamedTuple):
    """All tasks side by side along the first dimension.

    Attributes:
        examples: K + 1 offsets.
        tokens: K + 1 offsets in the packed stream, for layers that work on one.
    """

    examples: tuple[int, ...]
    tokens: tuple[int, ...] | None

    def offsets(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return where each task begins in the flattened rows of a layer's input.

        Args:
            shape: of the input, without the dimension that the layer works on.

        Raises:
            ValueError: the batch does not lie along its first dimension.
        """
        for stream in (self.examples, self.tokens):
            if stream is not None and shape and shape[0] == stream[-1]:
                inner = math.prod(shape[1:])
                return tuple(inner * offset for offset in stream)
        known = f"{self.examples[-1]} examples"
        if self.tokens is not None:
            known += f" or {self.tokens[-1]} tokens"
        raise ValueError(
            f"input of {list(shape)} rows, expected {known} along the first dimension; "
            "a layer that sees one task only is called within `task`"
        )


class Single(NamedTuple):
    """One task has every row."""

    task: int
    num_tasks: int

    def offsets(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return where each task begins in the flattened rows of a layer's input."""
        return (0,) * (self.task + 1) + (math.prod(shape),) * (self.num_tasks - self.task)


class TaskLayers(TorchFunctionMode):
    """Runs the calls of a ``with`` block so that their backward pass fills task rows.

    Args:
        places: of the followed parameters, by ``id``.

    Attributes:
        tasks: how the tasks lie in what the layers see at the moment.
    """

    def __init__(self, places: Mapping[int, Place]) -> None:
        super().__init__()
        self._places = places
        self.tasks: Joined | Single | None = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        layer = _LAYERS.get(func)
        if layer is not None:
            return layer(self, *args, **kwargs)
        result = func(*args, **kwargs)
        place = next(self._places_among([*args, *kwargs.values()]), None)
        if place is not None and _is_differentiable(result):
            raise NotImplementedError(
                f"{place.name}: used by {resolve_name(func) or func}; task gradients are known for "
                "linear, layer norm and embedding layers"
            )
        return result

    def _places_among(self, values: Iterable[Any]) -> Iterator[Place]:
        """Yield the places of the parameters among a call's arguments."""
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in self._places:
                    yield self._places[id(value)]
            elif isinstance(value, list | tuple):
                yield from self._places_among(value)

    def _segments(self, place: Place, shape: Sequence[int]) -> TaskSegments:
        assert self.tasks is not None
        try:
            return TaskSegments(self.tasks.offsets(shape), accumulate=True)
        except ValueError as error:
            raise ValueError(f"{place.name}: {error}") from None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        of_weight, of_bias = self._places.get(id(weight)), self._places.get(id(bias))
        places = [place for place in (of_weight, of_bias) if place is not None]
        if not places:
            return F.linear(input, weight, bias)
        segments = self._segments(places[0], input.shape[:-1])
        stream = input.reshape(-1, input.shape[-1])
        if of_weight is None:
            assert bias is not None
            assert of_bias is not None
            out = F.linear(stream, weight)
            out = out + _spread(bias, of_bias, len(stream), segments).to(out.dtype)
        else:
            dtype = autocast_dtype(stream)
            if dtype is not None:
                stream, weight = stream.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            rows = _task_rows(of_weight, of_bias)
            own_bias = None if of_bias is None else bias
            out = linear(stream, weight, own_bias, rows=rows, segments=segments)
            if bias is not None and of_bias is None:
                out = out + bias
        return _note(out, places, segments).unflatten(0, input.shape[:-1])

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        of_weight, of_bias = self._places.get(id(weight)), self._places.get(id(bias))
        places = [place for place in (of_weight, of_bias) if place is not None]
        if not places:
            return F.layer_norm(input, list(normalized_shape), weight, bias, eps)
        if len(normalized_shape) != 1:
            raise NotImplementedError(f"{places[0].name}: layer norm over several dimensions")
        segments = self._segments(places[0], input.shape[:-1])
        if input.is_cuda and autocast_dtype(input) is not None:
            input = input.float()  # autocast's rule there
        rows = _task_rows(of_weight, of_bias)
        stream = input.reshape(-1, input.shape[-1])
        out = layer_norm(stream, weight, bias, eps, rows=rows, segments=segments)
        return _note(out, places, segments).view(input.shape)

    def _fused_layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *tasks: Any
    ) -> tuple[Tensor | None, ...]:
        """Run this package's operator, which also returns statistics that nobody reads here."""
        if not any(self._places_among((weight, bias))):
            return torch.ops.superbert.layer_norm(x, weight, bias, eps, *tasks)
        return self._layer_norm(x, x.shape[-1:], weight, bias, eps), None, None

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        place = self._places.get(id(weight))
        if place is None:
            return F.embedding(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )
        if max_norm is not None or scale_grad_by_freq:
            raise NotImplementedError(f"{place.name}: embedding by max_norm or scale_grad_by_freq")
        index = self._index_of_each(place, input)
        segments = self._segments(place, index.shape)
        stream = index.reshape(-1).long()
        out = embedding(stream, weight, rows=_task_rows(place, None), segments=segments)
        if padding_idx is not None:
            padding = (stream == padding_idx % len(weight))[:, None]
            out.register_hook(lambda gradient: gradient.masked_fill(padding, 0))
        return _note(out, [place], segments).unflatten(0, index.shape)

    def _index_of_each(self, place: Place, index: Tensor) -> Tensor:
        """Give each example its own index where all share one, as positions ``[1, S]`` do.

        The output then has the batch along its first dimension already, before anything is added.
        """
        if not isinstance(self.tasks, Joined):
            return index
        if index.dim() == 1 and self.tasks.tokens is None:
            raise ValueError(
                f"{place.name}: an index of one dimension may be examples, or positions that all "
                "examples share; give it two: [examples, 1] or [1, positions]"
            )
        if index.dim() > 1 and len(index) == 1:
            return index.expand(self.tasks.examples[-1], *index.shape[1:])
        return index


_LAYERS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.linear: TaskLayers._linear,
    F.layer_norm: TaskLayers._layer_norm,
    F.embedding: TaskLayers._embedding,
    torch.ops.superbert.layer_norm: TaskLayers._fused_layer_norm,
}


def _task_rows(weight: Place | None, bias: Place | None) -> TaskRows:
    """Join the places of a layer's parameters; None stands for a frozen one, or none."""
    first = weight or bias
    assert first is not None
    columns = (None if place is None else place.columns for place in (weight, bias))
    return TaskRows(first.buffer, *columns)


def _spread(bias: Tensor, place: Place, count: int, segments: TaskSegments) -> Tensor:
    """Give every row a bias whose weight is frozen: a table with one row, looked up by each."""
    index = torch.zeros(count, dtype=torch.int64, device=bias.device)
    rows = TaskRows(place.buffer, Columns(place.columns.start, (1, *bias.shape)))
    return embedding(index, bias[None], rows=rows, segments=segments)


class _Note(torch.autograd.Function):
    """Passes a layer's output through; when its gradient comes, a loss has reached the layer."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, places: Sequence[Place], tasks: set[int]) -> Tensor:
        # Activation checkpointing compares what was saved with what is saved when layers run again.
        # One tensor more than the plain layer saves: where that one is run instead, it raises.
        ctx.save_for_backward(torch.empty(0))
        ctx.places, ctx.tasks = places, tasks
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        assert ctx.saved_tensors
        for place in ctx.places:
            place.tasks.update(ctx.tasks)
        return gradient, None, None


def _note(out: Tensor, places: Sequence[Place], segments: TaskSegments) -> Tensor:
    """Note, once a loss reaches ``out``, that its tasks have reached the parameters."""
    tasks = {task for task, (begin, end) in enumerate(pairwise(segments.offsets)) if begin < end}
    return _Note.apply(out, places, tasks)  # type: ignore[no-untyped-call]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of a linear layer's input, where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _is_differentiable(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.grad_fn is not None
    return isinstance(result, list | tuple) and any(map(_is_differentiable, result))
