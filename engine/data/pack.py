"""Lay the examples of a step side by side in one stream of tokens, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .part import Examples, Indices, Labels, Part, map_labels, ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The S sequences of K tasks as one stream of T tokens.

    A task's sequences lie side by side, tasks in the order in which they were given.  A task of
    two-sentence examples has all its first sentences and then, in the same order, all its second
    ones, so that the rows of its pooled states are ``u = rows[:n]`` and ``v = rows[n:]``.

    Attributes:
        tasks: their names.
        input_ids: int64 ``[T]``.
        position_ids: int64 ``[T]``, from 0 in every sequence.
        token_type_ids: int64 ``[T]``; zeros for the tasks, whose sentences are encoded each by
            itself.
        cu_seqlens: int32 ``[S + 1]``; sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: the tokens of the longest sequence.
        task_offsets: K + 1 sequence numbers; task k has ``task_offsets[k]:task_offsets[k + 1]``.
        token_offsets: K + 1 token numbers; task k has ``token_offsets[k]:token_offsets[k + 1]``.
        labels: of each task, or None for a task without labels.
        examples: how many examples n each task has.
        columns: how many sentences an example of each task has, 1 or 2.
        padded_tokens: the tokens of the padded batches that this replaces, one for each column of
            each task.
        states: fp32 ``[T, H]``, hidden states from an encoder that is frozen, or None where it has
            yet to run.
    """

    tasks: tuple[str, ...]
    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    task_offsets: tuple[int, ...]
    token_offsets: tuple[int, ...]
    labels: tuple[Labels | None, ...]
    examples: tuple[int, ...]
    columns: tuple[int, ...]
    padded_tokens: int
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
    def fill(self) -> float:
        """The share of tokens in the padded batches that this replaces; 1 is no padding."""
        return self.num_tokens / self.padded_tokens

    def task_cu_seqlens(self) -> list[Tensor]:
        """Return for each task where its sequences begin and end among its own tokens."""
        return [
            self.cu_seqlens[start : end + 1] - first
            for (start, end), first in zip(
                pairwise(self.task_offsets), self.token_offsets[:-1], strict=True
            )
        ]

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the batch on ``device``; from pinned memory the copy does not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=tensor.is_pinned()))

    def pin_memory(self) -> "PackedBatch":
        """Return the batch in pinned host memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "PackedBatch":
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            token_type_ids=move(self.token_type_ids),
            cu_seqlens=move(self.cu_seqlens),
            labels=tuple(map_labels(labels, move) for labels in self.labels),
            states=None if self.states is None else move(self.states),
        )


def pack(sources: Sequence[Examples], picks: Sequence[Indices], step: int = 0) -> PackedBatch:
    """Pack chosen examples of each task.

    Args:
        sources: of K tasks.
        picks: for each, the indices of its examples, in the order in which they shall stand.
        step: decides what is random about the examples themselves, such as masks.

    Raises:
        ValueError: there is no task, or not one list of examples for each, or an empty one.
    """
    if not sources or len(sources) != len(picks):
        raise ValueError(f"picks: expected one for each split, got {len(picks)} for {len(sources)}")
    for source, chosen in zip(sources, picks, strict=True):
        if len(chosen) == 0:
            raise ValueError(f"picks: no example of task {source.task!r}")
    return join([source.part(chosen, step) for source, chosen in zip(sources, picks, strict=True)])


def join(parts: Sequence[Part]) -> PackedBatch:
    """Lay the parts of K tasks side by side; either all bring hidden states, or none."""
    sizes = np.concatenate([part.sizes for part in parts])
    cu_seqlens = np.zeros(len(sizes) + 1, dtype=np.int32)
    np.cumsum(sizes, out=cu_seqlens[1:])
    states = [part.states for part in parts if part.states is not None]
    return PackedBatch(
        tasks=tuple(part.task for part in parts),
        input_ids=torch.from_numpy(np.concatenate([part.tokens for part in parts])),
        position_ids=torch.from_numpy(ranges(np.zeros_like(sizes), sizes)),
        token_type_ids=torch.from_numpy(np.concatenate([_token_types(part) for part in parts])),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(sizes.max()),
        task_offsets=_offsets([part.sizes for part in parts]),
        token_offsets=_offsets([part.tokens for part in parts]),
        labels=tuple(part.labels for part in parts),
        examples=tuple(part.examples for part in parts),
        columns=tuple(part.columns for part in parts),
        padded_tokens=sum(_padded_tokens(part) for part in parts),
        states=torch.from_numpy(np.concatenate(states)) if states else None,
    )


def _token_types(part: Part) -> Indices:
    return np.zeros_like(part.tokens) if part.token_types is None else part.token_types


def _padded_tokens(part: Part) -> int:
    """Return the tokens of the padded batches, one for each column, that hold the same."""
    longest = part.sizes.reshape(part.columns, -1).max(axis=1)
    return int(longest.sum()) * part.examples


def _offsets(parts: Sequence[Indices]) -> tuple[int, ...]:
    return (0, *np.cumsum([len(part) for part in parts]).tolist())
