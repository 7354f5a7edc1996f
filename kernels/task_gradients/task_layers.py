"""Replace the layers of any model by ones that write task gradients.

:class:`TaskLayers` is a torch function mode: within its ``with`` block every torch call passes
through it.  Calls of linear, layer norm and embedding on a followed parameter run as the functions
of this package that write task rows.  Any other call on inputs of one task gets stand-ins for the
followed parameters, whose gradients by autograd go into that task's row; on inputs of all tasks it
is refused by name, since their gradients could not be separated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo import eval_frame
from torch.nn import functional as F
from torch.overrides import resolve_name

from ..dropout.dropout import dropout
from ..embedding.embedding import embedding
from ..embedding_layer_norm.embedding_layer_norm import (
    EmbeddingRows,
    embedding_layer_norm,
    embedding_layer_norm_reference,
)
from ..layer_norm.layer_norm import dropout_add_layer_norm, layer_norm, rms_norm
from ..linear.linear import joint_linear, linear
from ..registration.function_modes import LayerMode, active_layer_modes
from ..registration.validation import may_look
from ..task_rows import TaskRows, TaskSegments
from .batch_division import Joined, Single
from .parameter_places import Place, StandIn, note, spread_bias, task_rows
from .torch_calls import WRITE_WEIGHTS, is_written_in_python, uses_values


def announce_stream(cu_seqlens: Tensor, starts: Sequence[int] | None = None) -> None:
    """Tell task gradients, where they are collected, of a packed stream before its layers run.

    Args:
        cu_seqlens: int32 ``[S + 1]``, the boundaries of its sequences, an example each.
        starts: the same on the host, where they are known there.  Otherwise task gradients that
            were not given the tasks' tokens read them, which on a GPU waits for the device; those
            that were read them to compare, where values are checked.
    """
    modes = [mode for mode in active_layer_modes() if isinstance(mode, TaskLayers)]
    if torch.compiler.is_compiling():
        starts = None
    if starts is None and any(mode.must_read(cu_seqlens) for mode in modes):
        _announce_what_is_read(cu_seqlens, modes)
    for mode in modes:
        mode.divide_stream(cu_seqlens, starts)


def sees_several_tasks() -> bool:
    """Whether task gradients are collected of a batch that joins tasks."""
    modes = active_layer_modes()
    return any(isinstance(mode, TaskLayers) and isinstance(mode.tasks, Joined) for mode in modes)


@torch.compiler.disable(
    reason="how many tokens each task has is known on the host alone; give them to "
    "TaskGradients.batch as `tokens`"
)
def _announce_what_is_read(cu_seqlens: Tensor, modes: "Sequence[TaskLayers]") -> None:
    starts = cu_seqlens.tolist()
    for mode in modes:
        mode.divide_stream(cu_seqlens, starts)


class TaskLayers(LayerMode):
    """A torch function mode whose calls write task rows in their backward pass.

    Args:
        places: of the followed parameters, by ``id``.

    Attributes:
        tasks: the tasks of the layers' inputs at the moment.
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
        place = next(self._places_among([*args, *kwargs.values()]), None)
        if place is None or not torch.is_grad_enabled() or not uses_values(func):
            if torch.compiler.is_compiling() and is_written_in_python(func):
                return getattr(args[0], func.__name__)(*args[1:], **kwargs)
            return func(*args, **kwargs)
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"{place.name}: used inside torch.func.vmap, grad or the like; make "
                "`parameter.view_as(parameter)` before it, within `task`, and use that"
            )
        layer = _LAYERS.get(func)
        if layer is not None:
            return layer(self, *args, **kwargs)
        return self._other(place, func, *args, **kwargs)

    def must_read(self, cu_seqlens: Tensor) -> bool:
        """Whether boundaries that are not known on the host are needed there, or may be checked."""
        tasks = self.tasks
        return isinstance(tasks, Joined) and (not tasks.tokens_given or may_look(cu_seqlens))

    def divide_stream(self, cu_seqlens: Tensor, starts: Sequence[int] | None) -> None:
        """Find the tokens of each task in the stream that follows, whose sequences are examples.

        Raises:
            ValueError: other examples, or tokens, than were given to ``batch``.
        """
        tasks = self.tasks
        if not isinstance(tasks, Joined):
            return
        sequences, examples = cu_seqlens.shape[0] - 1, tasks.streams()[0]
        if sequences != examples[-1]:
            raise ValueError(
                f"examples: the model got {sequences} sequences, expected the {examples[-1]} of "
                "`batch`; give it all examples in one call, or those of one task within `task`"
            )
        if starts is None:
            return
        tokens = tuple(starts[example] for example in examples)
        if not tasks.tokens_given:
            self.tasks = Joined.of(tasks.examples, tokens, False)
        elif tasks.tokens != tokens:
            raise ValueError(
                f"tokens: tasks of the model's sequences begin at {tokens}, expected {tasks.tokens}"
            )

    def _other(self, place: Place, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call that no layer of this package stands for."""
        if isinstance(self.tasks, Single):
            return self._with_stand_ins(func, *args, **kwargs)
        result = func(*args, **kwargs)
        if _is_differentiable(result):
            raise _refusal(place, func)
        return result

    def _with_stand_ins(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a call that sees one task; what autograd finds for a parameter goes into its row."""
        stand_in = partial(self._stand_in, writable=func in WRITE_WEIGHTS)
        return func(*map(stand_in, args), **{name: stand_in(kwargs[name]) for name in kwargs})

    def _stand_in(self, value: Any, writable: bool) -> Any:
        """Put stand-ins into an argument, or into the lists and tuples that it is made of."""
        if not any(self._places_among([value])):
            return value
        if isinstance(value, Tensor):
            assert isinstance(self.tasks, Single)
            place, task = self._places[id(value)], self.tasks.task
            return StandIn.apply(value, place, task, writable)  # type: ignore[no-untyped-call]
        replaced = (self._stand_in(item, writable) for item in value)
        return list(replaced) if isinstance(value, list) else tuple(replaced)

    def _places_among(self, values: Iterable[Any]) -> Iterator[Place]:
        """Yield the places of the parameters among a call's arguments."""
        for value in values:
            # Of other tensors torch.compile knows no `id`.
            if isinstance(value, nn.Parameter):
                if id(value) in self._places:
                    yield self._places[id(value)]
            elif isinstance(value, list | tuple):
                yield from self._places_among(value)

    def _place_of(self, parameter: Tensor | None) -> Place | None:
        # torch.compile of torch 2.11 knows no `id` of None.
        return None if parameter is None else self._places.get(id(parameter))

    def _segments(self, place: Place, shape: Sequence[int]) -> TaskSegments:
        assert self.tasks is not None
        try:
            return TaskSegments(self.tasks.offsets(shape), accumulate=True)
        except ValueError as error:
            raise ValueError(f"{place.name}: {error}") from None

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        of_weight, of_bias = self._place_of(weight), self._place_of(bias)
        places = [place for place in (of_weight, of_bias) if place is not None]
        is_usual = input.dim() > 0 and weight.dim() == 2
        if not is_usual or (bias is not None and bias.shape != weight.shape[:1]):
            return self._other(places[0], F.linear, input, weight, bias)
        segments = self._segments(places[0], input.shape[:-1])
        stream = _flat(input)
        if of_weight is None:
            assert bias is not None
            assert of_bias is not None
            out = F.linear(stream, weight)
            out = out + spread_bias(bias, of_bias, len(stream), segments).to(out.dtype)
        else:
            dtype = autocast_dtype(stream)
            if dtype is not None:
                stream, weight = stream.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            rows = task_rows(of_weight, of_bias)
            own_bias = None if of_bias is None else bias
            out = linear(stream, weight, own_bias, rows=rows, segments=segments)
            if bias is not None and of_bias is None:
                out = out + bias
        return note(out, places, segments).view(*input.shape[:-1], out.shape[-1])

    def _joint_linear(
        self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]
    ) -> Tensor:
        """Apply layers one by one, since each has columns of its own."""
        outputs = []
        for weight, bias in zip(weights, biases, strict=True):
            is_followed = any(self._places_among([weight, bias]))
            outputs.append((self._linear if is_followed else F.linear)(x, weight, bias))
        return torch.cat(outputs, -1)

    def _layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        of_weight, of_bias = self._place_of(weight), self._place_of(bias)
        places = [place for place in (of_weight, of_bias) if place is not None]
        shape = tuple(normalized_shape)
        parameters = [parameter for parameter in (weight, bias) if parameter is not None]
        is_usual = shape == input.shape[-1:] and shape != (0,)
        if not is_usual or any(parameter.shape != shape for parameter in parameters):
            return self._other(places[0], F.layer_norm, input, list(shape), weight, bias, eps)
        segments = self._segments(places[0], input.shape[:-1])
        if input.is_cuda and autocast_dtype(input) is not None:
            input = input.float()  # autocast's rule there
        if weight is None:
            weight = torch.ones_like(parameters[0], requires_grad=False)
        rows = task_rows(of_weight, of_bias)
        out = layer_norm(_flat(input), weight, bias, eps, rows=rows, segments=segments)
        return note(out, places, segments).view(input.shape)

    def _rms_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        place, shape = self._place_of(weight), tuple(normalized_shape)
        assert weight is not None  # it alone may be followed
        assert place is not None
        if not (shape == input.shape[-1:] == weight.shape and shape != (0,)):
            return self._other(place, F.rms_norm, input, list(shape), weight, eps)
        segments = self._segments(place, input.shape[:-1])
        if input.is_cuda and autocast_dtype(input) is not None:
            input = input.float()  # autocast's rule there
        if eps is None:  # torch's is that of the dtype in which it computes
            eps = torch.finfo(torch.promote_types(input.dtype, torch.float32)).eps
        rows = task_rows(place, None)
        out = rms_norm(_flat(input), weight, eps, rows=rows, segments=segments)
        return note(out, [place], segments).view(input.shape)

    def _fused_layer_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        """Run this package's operator, which also returns statistics that nobody reads here."""
        *_tasks, is_rms_norm = rest
        if is_rms_norm:
            return self._rms_norm(x, x.shape[-1:], weight, eps), None, None
        return self._layer_norm(x, x.shape[-1:], weight, bias, eps), None, None

    def _add_norm(
        self,
        x: Tensor,
        residual: Tensor,
        x_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        dropout_p: float,
        eps: float,
        seed: Tensor | None,
        rng_offset: int,
        *rest: Any,
    ) -> tuple[Tensor | None, ...]:
        """Run this package's norm of a sum, which also returns what nobody reads here."""
        *_tasks, prenorm, is_rms_norm = rest
        parameters = (weight, bias, x_bias)
        own = [self._place_of(parameter) for parameter in parameters]
        places = [place for place in own if place is not None]
        segments = self._segments(places[0], x.shape[:-1])
        columns = (None if place is None else place.slot.columns for place in own)
        out = dropout_add_layer_norm(
            *(_flat(x), _flat(residual), weight, bias, dropout_p, eps),
            x_bias=x_bias,
            seed=seed,
            rng_offset=rng_offset,
            rows=TaskRows(places[0].buffer, *columns),
            segments=segments,
            prenorm=prenorm,
            is_rms_norm=is_rms_norm,
        )
        out, total = (out, None) if isinstance(out, Tensor) else out
        if total is not None:
            total = note(total, places, segments, is_saved=True).view(x.shape)
        return note(out, places, segments).view(x.shape), total, None, None

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
        place = self._places[id(weight)]
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        if max_norm is not None and isinstance(self.tasks, Joined):
            raise _refusal(place, F.embedding)  # before the weights are scaled
        is_usual = weight.dim() == 2 and input.dtype in (torch.int32, torch.int64)
        if not is_usual or max_norm is not None or scale_grad_by_freq:
            return self._other(place, F.embedding, input, weight, *options)
        if padding_idx is not None and not -len(weight) <= padding_idx < len(weight):
            return F.embedding(input, weight, *options)  # torch's error
        index = self._index_of_each(place, input)
        segments = self._segments(place, index.shape)
        stream = index.reshape(-1).long()
        out = embedding(stream, weight, rows=task_rows(place, None), segments=segments)
        if padding_idx is not None and out.requires_grad:
            # No hook: torch.compile of torch 2.11 moves a graph's inputs behind their uses for one.
            is_padding = (stream == padding_idx % len(weight))[:, None]
            out = torch.where(is_padding, out.detach(), out)
        return note(out, [place], segments).view(*index.shape, out.shape[-1])

    def _embedding_norm(
        self, *arguments: Tensor | None, rows: object = None, **options: Any
    ) -> Tensor:
        """Run this package's embedding layer: three indices, their tables, weight and bias."""
        ids: Any = arguments[:3]
        tables: Any = arguments[3:6]
        weight, bias = parameters = arguments[6:]
        own = [self._place_of(parameter) for parameter in (*tables, *parameters)]
        places = [place for place in own if place is not None]
        if rows is not None:
            return self._other(places[0], embedding_layer_norm, *arguments, rows=rows, **options)
        given = zip((*tables, *parameters), own, strict=True)
        if any(p is not None and p.requires_grad and place is None for p, place in given):
            return self._embedding_norm_by_layers(ids, tables, weight, bias, **options)
        segments = self._segments(places[0], ids[0].shape)
        if weight is None:
            weight = torch.ones_like(tables[0][0], requires_grad=False)
        buffer = places[0].buffer
        columns = [None if place is None else place.slot.columns for place in own]
        word, position, token_type = (TaskRows(buffer, of_table) for of_table in columns[:3])
        of_norm = TaskRows(buffer, *columns[3:])
        out = embedding_layer_norm(
            *(index.reshape(-1) for index in ids),
            *(*tables, weight, bias),
            **{**options, "segments": segments},
            rows=EmbeddingRows(word, position, token_type, of_norm),
        )
        return note(out, places, segments).view(*ids[0].shape, out.shape[-1])

    def _embedding_norm_by_layers(
        self,
        ids: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor, Tensor, Tensor],
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        dropout_p: float,
        eps: float,
        training: bool,
        seed: Tensor | None,
        rng_offset: int,
        padding_idx: Any,
        **_: object,
    ) -> Tensor:
        """Run layer after layer where autograd gets the gradients of some parameters."""
        with self:
            out = embedding_layer_norm_reference(
                *(ids, tables, weight, bias, eps), padding=padding_idx
            )
        p = dropout_p if training else 0.0
        return dropout(out, p, seed=seed, rng_offset=rng_offset)

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
        if self.tasks.is_stream(index.shape):
            return index
        if index.dim() > 1 and len(index) == 1:
            return index.expand(self.tasks.streams()[0][-1], *index.shape[1:])
        return index


# Trace it as a part of graphs alone.  Compiled by itself, behind a break of one, it would be taken
# for any other attribute of a tensor: torch.compile does not guard which one it was called for.
_SKIP = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(
    TaskLayers.__torch_function__.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP)
)

_LAYERS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    F.linear: TaskLayers._linear,
    F.layer_norm: TaskLayers._layer_norm,
    F.rms_norm: TaskLayers._rms_norm,
    F.embedding: TaskLayers._embedding,
    embedding_layer_norm: TaskLayers._embedding_norm,
    joint_linear: TaskLayers._joint_linear,
    torch.ops.superbert.layer_norm: TaskLayers._fused_layer_norm,
    torch.ops.superbert.dropout_add_layer_norm: TaskLayers._add_norm,
}


def _flat(input: Tensor) -> Tensor:
    """``[..., N]`` as ``[T, N]``, N = 0 included."""
    return input.reshape(math.prod(input.shape[:-1]), input.shape[-1])


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype of a linear layer's input, where it is on."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return None


def _refusal(place: Place, func: Callable[..., Any]) -> NotImplementedError:
    return NotImplementedError(
        f"{place.name}: used by {resolve_name(func) or func} on a batch of all tasks, where task "
        "gradients are known for linear (weight [O, I], bias [O]), layer norm, RMS norm (over the "
        "last dimension) and embedding layers (without max_norm and scale_grad_by_freq) only; "
        "within `task(k)` any layer is taken"
    )


def _is_differentiable(result: Any) -> bool:
    if isinstance(result, Tensor):
        return result.grad_fn is not None
    return isinstance(result, list | tuple) and any(map(_is_differentiable, result))
