"""States of balancing methods: what they remember from step to step, as tuples of tensors.

Each tensor is ``[K]`` or ``[1]``; of G groups that each have their own, ``[G, K]`` or ``[G, 1]``.
Methods compute in float64 and return the dtypes that they were given, without graphs.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..registration.validation import check_data

State = TypeVar("State", bound=tuple[Any, ...])

# Of the states' tensors these are [1].
COUNTERS = frozenset({"steps", "windows"})


class Step(NamedTuple, Generic[State]):
    """Result of a method with a state.

    Attributes:
        weights: ``[K]`` in the dtype of the Gram matrix.
        state: for the next step, in the dtypes of the present one; the present one where there are
            no weights.
    """

    weights: Tensor
    state: State


# ---- of each method ------------------------------------------------------------------------------


class Learned(NamedTuple):
    """Variables that a method learns beside the model, one of each task, with Adam's moments.

    Attributes:
        values: ``[K]`` variables.
        means: ``[K]`` running means of their slopes.
        squares: ``[K]`` running means of the slopes' squares.
        steps: ``[1]`` number of steps so far.
    """

    values: Tensor
    means: Tensor
    squares: Tensor
    steps: Tensor


class Famo(NamedTuple):
    """Learned logits of the tasks, and the losses of the step before.

    Attributes:
        logits: ``[K]``, 0 at first.
        means: ``[K]`` running means of their slopes.
        squares: ``[K]`` running means of the slopes' squares.
        steps: ``[1]`` number of Adam's steps so far.
        losses: ``[K]`` of the step before; 0 at first.
    """

    logits: Tensor
    means: Tensor
    squares: Tensor
    steps: Tensor
    losses: Tensor


class WindowAverages(NamedTuple):
    """Mean losses of windows of steps.

    Attributes:
        present: ``[K]`` mean of the present window so far.
        last: ``[K]`` mean of the last whole window.
        before: ``[K]`` mean of the window before that one.
        steps: ``[1]`` steps of the present window so far.
        windows: ``[1]`` whole windows so far.
    """

    present: Tensor
    last: Tensor
    before: Tensor
    steps: Tensor
    windows: Tensor


class Nadir(NamedTuple):
    """Losses that others are measured by.

    Attributes:
        losses: ``[K]`` mean of the losses of the warm-up so far.
        steps: ``[1]`` steps of the warm-up so far.
    """

    losses: Tensor
    steps: Tensor


def initial_state(
    kind: type[State],
    num_tasks: int,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> State:
    """Return the state before the first step: zeros."""
    lengths = (1 if name in COUNTERS else num_tasks for name in field_names(kind))
    return kind(*(torch.zeros(length, device=device, dtype=dtype) for length in lengths))


def field_names(kind: type[tuple[Any, ...]]) -> tuple[str, ...]:
    """Return the names of a state's tensors."""
    names: tuple[str, ...] = kind._fields  # type: ignore[attr-defined]
    return names


# ---- within a step -------------------------------------------------------------------------------


def read_state(gram: Tensor, state: State | None, kind: type[State]) -> State:
    """Check a state; the first one takes the place of None.

    Raises:
        TypeError: it is of another kind.
        ValueError: a tensor's shape is another, but for a first dimension G.
    """
    dtype = torch.promote_types(gram.dtype, torch.float32)
    first = initial_state(kind, gram.shape[-1], gram.device, dtype)
    if state is None:
        return first
    if not isinstance(state, kind):
        raise TypeError(f"state: expected {kind.__name__}, got {type(state).__name__}")
    for name, tensor, other in zip(field_names(kind), state, first, strict=True):
        check_data(**{f"state.{name}": tensor})
        expected = list(other.shape)
        if list(tensor.shape) not in (expected, [*gram.shape[:-2], *expected]):
            raise ValueError(f"state.{name}: expected {expected}, got {list(tensor.shape)}")
    return state


def in_float64(state: State) -> State:
    """Return a state without graphs, in float64."""
    return type(state)(*(tensor.detach().double() for tensor in state))


def next_state(new: State, present: State, changes: Tensor) -> State:
    """Return the new state where it ``changes [..., 1]``, in the dtypes of the present one."""
    pairs = zip(new, present, strict=True)
    return type(present)(
        *(torch.where(changes, after.to(before.dtype), before.detach()) for after, before in pairs)
    )
