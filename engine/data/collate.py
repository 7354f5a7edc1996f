"""Concatenate the examples of a step to one stream of tokens, without padding."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .._kernels import kernels
from ..utils.arrays import Indices, ranges
from .batch_shapes import PADDING_TOKENS, BatchShape, Shapes
from .task_batch import Examples, Labels, TaskBatch, empty_task_batch, map_labels, pad_labels


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The S sequences of K tasks as one stream of T tokens.

    Each task's sequences are contiguous, in the order of the tasks.  A task of two-sentence
    examples has all its first sentences and then, in the same order, all its second ones, so that
    the rows of its pooled states are ``u = rows[:n]`` and ``v = rows[n:]``.  Of retrieval there are
    further ones behind them.

    A batch that was padded to a shape may have sequences of padding tokens after those of each
    task, some of them empty; no head reads them, so they contribute to no loss and no gradient.

    Attributes:
        tasks: their names.
        input_ids: int64 ``[T]``.
        position_ids: int64 ``[T]``, from 0 in every sequence; 0 in padding.
        token_type_ids: int64 ``[T]``; zeros for the tasks, whose sentences are encoded each by
            itself.
        cu_seqlens: int32 ``[S + 1]``; sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: the tokens of the longest sequence, or more.
        max_own_seqlen: the same without the padding sequences.
        task_offsets: K + 1 sequence numbers; task k has ``task_offsets[k]:task_offsets[k + 1]``,
            its padding included.
        sequences: the number of each task's sequences, without padding.
        token_offsets: K + 1 token numbers; task k has ``token_offsets[k]:token_offsets[k + 1]``.
        labels: of each task, or None for a task without labels.
        examples: the number n of each task's examples.
        columns: the number of sentences in an example of each task, 1 or 2, of retrieval 2 or more.
        padding: tokens of the padding sequences.
        padded_tokens: the tokens of the padded batches that this replaces, one for each column of
            each task.
        terms: of each task's mean loss: its examples, or its tagged tokens.
        step_terms: the same in the whole step, in all micro-batches and on all ranks; None where
            that is not known.
        states: fp32 ``[T, H]``, precomputed hidden states of a frozen encoder, or None.
        lookup_plan: int64 ``[n]``, the order in which a step adds up the gradients of tables; None
            where it finds that order itself.
        attention_plan: of ``cu_seqlens``; None on a CPU, whose attention needs none.
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
    terms: tuple[int, ...] = ()
    step_terms: tuple[int, ...] | None = None
    states: Tensor | None = None
    lookup_plan: Tensor | None = None
    attention_plan: kernels.AttentionPlan | None = None

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
        """The same for two batches that one recorded step can run on."""
        offsets = (self.task_offsets, self.sequences, self.token_offsets)
        longest = (self.max_seqlen, self.max_own_seqlen)
        # Other shares of the step are other factors of the losses, recorded with them.
        share = self.step_terms not in (None, self.terms) and (self.terms, self.step_terms)
        host = (self.tasks, *offsets, *longest, self.examples, self.columns, share)
        return host, tuple(t.shape for t in self.tensors)

    def own_sequences(self) -> list[slice]:
        """Return the sequences of each task, without padding, as slices of all sequences."""
        return [
            slice(start, start + count)
            for start, count in zip(self.task_offsets[:-1], self.sequences, strict=True)
        ]

    def task_cu_seqlens(self) -> list[Tensor]:
        """Return ``cu_seqlens`` of each task's sequences, counted from its first token."""
        return [
            self.cu_seqlens[own.start : own.stop + 1] - first
            for own, first in zip(self.own_sequences(), self.token_offsets[:-1], strict=True)
        ]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch on ``device``; from pinned memory the copy does not block."""
        batch = self.planned() if torch.device(device).type == "cuda" else self
        return batch.map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in pinned host memory, from which a GPU copies it."""
        return self.planned().map(Tensor.pin_memory)

    def planned(self) -> "PackedBatch":
        """Return the batch with what a GPU's layers need to know of its sequences."""
        if self.attention_plan is not None:
            return self
        plan = kernels.attention_plan(self.cu_seqlens, len(self.input_ids))
        return replace(self, attention_plan=plan)

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
            lookup_plan=None if self.lookup_plan is None else move(self.lookup_plan),
            attention_plan=None
            if self.attention_plan is None
            else kernels.AttentionPlan(*map(move, self.attention_plan)),
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
        picks: for each, the indices of its examples, in the order that they get in the batch; not
            all are empty.
        step: decides what is random about the examples themselves, such as masks.
        shapes: the batch is padded to one of them; None for no padding.

    Raises:
        ValueError: there is no task or no example, or not one list of examples for each task.
    """
    if not sources or len(sources) != len(picks):
        raise ValueError(f"picks: expected one for each split, got {len(picks)} for {len(sources)}")
    if not any(len(chosen) for chosen in picks):
        raise ValueError(f"picks: no example of {', '.join(source.task for source in sources)}")
    batches = [
        source.task_batch(chosen, step) if len(chosen) else empty_task_batch(source.task)
        for source, chosen in zip(sources, picks, strict=True)
    ]
    if shapes is None:
        return join(batches)
    tasks = tuple(batch.task for batch in batches)
    counts = [len(batch.tokens) for batch in batches]
    return join(batches, shapes.shape(tasks, counts, _longest(batches)))


def join(batches: Sequence[TaskBatch], shape: BatchShape | None = None) -> PackedBatch:
    """Concatenate the batches of K tasks; either all hold hidden states, or none.

    Args:
        batches: of the tasks.
        shape: tokens that each is padded to; None for no padding.
    """
    tokens = [len(batch.tokens) for batch in batches] if shape is None else shape.tokens
    sequences = [0] * len(batches) if shape is None else shape.padding_sequences
    padded = [_pad(*each) for each in zip(batches, tokens, sequences, strict=True)]
    sizes = np.concatenate([one.sizes for one in padded])
    cu_seqlens = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=cu_seqlens[1:])
    states = [one.states for one in padded if one.states is not None]
    longest, longest_padding = _longest(batches), 0
    if shape is not None:
        longest, longest_padding = max(longest, shape.max_seqlen), shape.max_padding
    return PackedBatch(
        tasks=tuple(batch.task for batch in batches),
        input_ids=torch.from_numpy(np.concatenate([one.tokens for one in padded])),
        position_ids=torch.from_numpy(np.concatenate([one.positions for one in padded])),
        token_type_ids=torch.from_numpy(np.concatenate([one.token_types for one in padded])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=max(longest, longest_padding),
        max_own_seqlen=longest,
        task_offsets=_offsets([len(one.sizes) for one in padded]),
        sequences=tuple(len(batch.sizes) for batch in batches),
        token_offsets=_offsets(tokens),
        labels=tuple(
            batch.labels if shape is None else pad_labels(batch.labels) for batch in batches
        ),
        examples=tuple(batch.examples for batch in batches),
        terms=tuple(batch.terms for batch in batches),
        columns=tuple(batch.columns for batch in batches),
        padding=sum(tokens) - sum(len(batch.tokens) for batch in batches),
        padded_tokens=sum(_padded_tokens(batch) for batch in batches),
        states=torch.from_numpy(np.concatenate(states)) if states else None,
    )


class _Padded(NamedTuple):
    """A task's tokens and sequences with the padding behind them."""

    tokens: Indices
    positions: Indices
    token_types: Indices
    sizes: Indices
    states: npt.NDArray[np.float32] | None


def _pad(batch: TaskBatch, tokens: int, sequences: int) -> _Padded:
    """Number the positions of a batch, and pad it to ``tokens`` by so many sequences more."""
    missing = tokens - len(batch.tokens)
    positions = ranges(np.zeros_like(batch.sizes), batch.sizes)
    types = np.zeros_like(batch.tokens) if batch.token_types is None else batch.token_types
    if missing == 0:
        return _Padded(batch.tokens, positions, types, batch.sizes, batch.states)
    states = None if batch.states is None else np.pad(batch.states, ((0, missing), (0, 0)))
    filled, positions, types = (
        np.pad(numbers, (0, missing)) for numbers in (batch.tokens, positions, types)
    )
    sizes = np.append(batch.sizes, padding_sizes(missing, sequences))
    return _Padded(filled, positions, types, sizes, states)


def padding_sizes(missing: int, sequences: int) -> Indices:
    """Divide padding into sequences of ``PADDING_TOKENS`` at most.

    Args:
        missing: tokens of padding, at most ``PADDING_TOKENS`` for each sequence.
        sequences: how many.

    Returns:
        int64 ``[sequences]``, the tokens of each: empty ones, one of the rest, and whole ones, so
        that these begin at the same places however much is missing.
    """
    behind = np.arange(sequences - 1, -1, -1) * PADDING_TOKENS
    return np.diff(np.maximum(missing - behind, 0), prepend=0)


def _longest(batches: Sequence[TaskBatch]) -> int:
    """Return the tokens of the longest sequence."""
    return max(int(batch.sizes.max(initial=0)) for batch in batches)


def _padded_tokens(batch: TaskBatch) -> int:
    """Return the tokens of padded batches, one for each column, with the same sequences."""
    longest = batch.sizes.reshape(batch.columns, -1).max(axis=1, initial=0)
    return int(longest.sum()) * batch.examples


def _offsets(counts: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(counts, initial=0))
