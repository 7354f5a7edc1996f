"""Lay the examples of a step side by side in one stream of tokens, without padding."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .batch_shapes import BatchShape, Shapes
from .task_batch import (
    Examples,
    Indices,
    Labels,
    TaskBatch,
    empty_task_batch,
    fill_labels,
    map_labels,
    ranges,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The S sequences of K tasks as one stream of T tokens.

    A task's sequences lie side by side, tasks in the order in which they were given.  A task of
    two-sentence examples has all its first sentences and then, in the same order, all its second
    ones, so that the rows of its pooled states are ``u = rows[:n]`` and ``v = rows[n:]``.

    A batch that was given a shape may have one sequence of padding tokens more behind each task's
    own; no head reads it, so that it takes no part in any loss or gradient.

    Attributes:
        tasks: their names.
        input_ids: int64 ``[T]``.
        position_ids: int64 ``[T]``, from 0 in every sequence.
        token_type_ids: int64 ``[T]``; zeros for the tasks, whose sentences are encoded each by
            itself.
        cu_seqlens: int32 ``[S + 1]``; sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: the tokens of the longest sequence, or more.
        max_own_seqlen: the same without the padding sequences.
        task_offsets: K + 1 sequence numbers; task k has ``task_offsets[k]:task_offsets[k + 1]``,
            its padding included.
        sequences: how many of these are a task's own.
        token_offsets: K + 1 token numbers; task k has ``token_offsets[k]:token_offsets[k + 1]``.
        labels: of each task, or None for a task without labels.
        examples: how many examples n each task has.
        columns: how many sentences an example of each task has, 1 or 2.
        padding: tokens of the padding sequences.
        padded_tokens: the tokens of the padded batches that this replaces, one for each column of
            each task.
        step_examples: how many examples each task has in the whole step, in all micro-batches and
            on all ranks; None where that is not known.
        states: fp32 ``[T, H]``, hidden states from an encoder that is frozen, or None where it has
            yet to run.
    """

    tasks: tuple[str, ...]
    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    max_own_seqlen: int
    task_offsets: tuple[int, ...]
    sequences: tuple[int, ...]
    token_offsets: tuple[int, ...]
    labels: tuple[Labels | None, ...]
    examples: tuple[int, ...]
    columns: tuple[int, ...]
    padding: int
    padded_tokens: int
    step_examples: tuple[int, ...] | None = None
    states: Tensor | None = None

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.examples)

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.token_offsets[-1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in an order that is always the same."""
        found: list[Tensor] = []

        def collect(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(collect)
        return tuple(found)

    @property
    def signature(self) -> Hashable:
        """What two batches have in common that the same recorded work can be done on."""
        host = (self.tasks, self.task_offsets, self.sequences, self.token_offsets, self.max_seqlen)
        return host, self.examples, self.columns, tuple(t.shape for t in self.tensors)

    def own_sequences(self) -> list[slice]:
        """Return for each task its sequences among all, without the padding."""
        return [
            slice(start, start + count)
            for start, count in zip(self.task_offsets[:-1], self.sequences, strict=True)
        ]

    def task_cu_seqlens(self) -> list[Tensor]:
        """Return for each task where its sequences begin and end among its own tokens."""
        return [
            self.cu_seqlens[own.start : own.stop + 1] - first
            for own, first in zip(self.own_sequences(), self.token_offsets[:-1], strict=True)
        ]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch on ``device``; from pinned memory the copy does not block."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in pinned host memory."""
        return self.map(Tensor.pin_memory)

    def map(self, move: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """Return the batch with ``move`` applied to every tensor."""
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            token_type_ids=move(self.token_type_ids),
            cu_seqlens=move(self.cu_seqlens),
            labels=tuple(map_labels(labels, move) for labels in self.labels),
            states=None if self.states is None else move(self.states),
        )


def pack(
    sources: Sequence[Examples],
    picks: Sequence[Indices],
    step: int = 0,
    shapes: Shapes | None = None,
) -> PackedBatch:
    """Pack chosen examples of each task.

    Args:
        sources: of K tasks.
        picks: for each, the indices of its examples, in the order in which they shall stand; not
            all are empty.
        step: decides what is random about the examples themselves, such as masks.
        shapes: one of which the batch is filled up to; None for no padding.

    Raises:
        ValueError: there is no task or no example, or not one list of examples for each task.
    """
    if not sources or len(sources) != len(picks):
        raise ValueError(f"picks: expected one for each split, got {len(picks)} for {len(sources)}")
    if not any(len(chosen) for chosen in picks):
        raise ValueError(f"picks: no example of {', '.join(source.task for source in sources)}")
    parts = [
        source.part(chosen, step) if len(chosen) else empty_task_batch(source.task)
        for source, chosen in zip(sources, picks, strict=True)
    ]
    if shapes is None:
        return join(parts)
    tasks = tuple(part.task for part in parts)
    return join(parts, shapes.shape(tasks, [len(part.tokens) for part in parts]))


def join(parts: Sequence[TaskBatch], shape: BatchShape | None = None) -> PackedBatch:
    """Lay the parts of K tasks side by side; either all bring hidden states, or none.

    Args:
        parts: of the tasks.
        shape: what each is filled up to; None for no padding.
    """
    tokens = [len(part.tokens) for part in parts] if shape is None else shape.tokens
    laid = [_lay(part, room) for part, room in zip(parts, tokens, strict=True)]
    sizes = np.concatenate([one.sizes for one in laid])
    cu_seqlens = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=cu_seqlens[1:])
    states = [one.states for one in laid if one.states is not None]
    longest = max(int(part.sizes.max(initial=0)) for part in parts)
    filling = 0
    if shape is not None:
        longest, filling = max(longest, shape.max_seqlen), shape.max_filling
    return PackedBatch(
        tasks=tuple(part.task for part in parts),
        input_ids=torch.from_numpy(np.concatenate([one.tokens for one in laid])),
        position_ids=torch.from_numpy(np.concatenate([one.positions for one in laid])),
        token_type_ids=torch.from_numpy(np.concatenate([one.token_types for one in laid])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(longest, filling),
        max_own_seqlen=longest,
        task_offsets=_offsets([len(one.sizes) for one in laid]),
        sequences=tuple(len(part.sizes) for part in parts),
        token_offsets=_offsets(tokens),
        labels=tuple(part.labels if shape is None else fill_labels(part.labels) for part in parts),
        examples=tuple(part.examples for part in parts),
        columns=tuple(part.columns for part in parts),
        padding=sum(tokens) - sum(len(part.tokens) for part in parts),
        padded_tokens=sum(_padded_tokens(part) for part in parts),
        states=torch.from_numpy(np.concatenate(states)) if states else None,
    )


class _Laid(NamedTuple):
    """A task's tokens and sequences as they stand in the stream."""

    tokens: Indices
    positions: Indices
    token_types: Indices
    sizes: Indices
    states: npt.NDArray[np.float32] | None


def _lay(part: TaskBatch, tokens: int) -> _Laid:
    """Number a part's positions; add a sequence of padding where there is room for more tokens."""
    room = tokens - len(part.tokens)
    positions = ranges(np.zeros_like(part.sizes), part.sizes)
    types = np.zeros_like(part.tokens) if part.token_types is None else part.token_types
    if room == 0:
        return _Laid(part.tokens, positions, types, part.sizes, part.states)
    states = None if part.states is None else np.pad(part.states, ((0, room), (0, 0)))
    filled, positions, types = (
        np.pad(numbers, (0, room)) for numbers in (part.tokens, positions, types)
    )
    return _Laid(filled, positions, types, np.append(part.sizes, room), states)


def _padded_tokens(part: TaskBatch) -> int:
    """Return the tokens of the padded batches, one for each column, that hold the same."""
    longest = part.sizes.reshape(part.columns, -1).max(axis=1, initial=0)
    return int(longest.sum()) * part.examples


def _offsets(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))
