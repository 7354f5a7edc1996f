"""Lay the examples of a step side by side in one stream of tokens, without padding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sample import Indices
from .split import TokenizedSplit


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """The S sequences of K tasks as one stream of T tokens.

    A task's sequences lie side by side, tasks in the order in which they were given.  A task of
    two-sentence examples has all its first sentences and then, in the same order, all its second
    ones, so that the rows of its pooled states are ``u = rows[:n]`` and ``v = rows[n:]``.

    Attributes:
        input_ids: int64 ``[T]``.
        position_ids: int64 ``[T]``, from 0 in every sequence.
        token_type_ids: int64 ``[T]``, zeros: the sentences are encoded each by itself.
        cu_seqlens: int32 ``[S + 1]``; sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: the tokens of the longest sequence.
        task_offsets: K + 1 sequence numbers; task k has ``task_offsets[k]:task_offsets[k + 1]``.
        token_offsets: K + 1 token numbers; task k has ``token_offsets[k]:token_offsets[k + 1]``.
        labels: float32 ``[n]`` of each task, or None for a task without labels.
        examples: how many examples n each task has.
        columns: how many sentences an example of each task has, 1 or 2.
        padded_tokens: the tokens of the padded batches that this replaces, one for each column of
            each task.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    task_offsets: tuple[int, ...]
    token_offsets: tuple[int, ...]
    labels: tuple[Tensor | None, ...]
    examples: tuple[int, ...]
    columns: tuple[int, ...]
    padded_tokens: int

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
            labels=tuple(None if label is None else move(label) for label in self.labels),
        )


def pack(splits: Sequence[TokenizedSplit], picks: Sequence[Indices]) -> PackedBatch:
    """Pack chosen examples of each task.

    Args:
        splits: K splits.
        picks: for each, the indices of its examples, in the order in which they shall stand.

    Raises:
        ValueError: there is no task, or not one list of examples for each, or an empty one.
    """
    if not splits or len(splits) != len(picks):
        raise ValueError(f"picks: expected one for each split, got {len(picks)} for {len(splits)}")
    tokens: list[npt.NDArray[np.int64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    labels: list[Tensor | None] = []
    padded_tokens = 0
    for split, chosen in zip(splits, picks, strict=True):
        if len(chosen) == 0:
            raise ValueError(f"picks: no example of task {split.task!r}")
        columns = np.arange(split.columns)[:, None]
        sequences = (chosen * split.columns + columns).reshape(-1)
        starts = split.offsets[sequences]
        sizes = split.offsets[sequences + 1] - starts
        tokens.append(split.tokens[_ranges(starts, sizes)].astype(np.int64))
        lengths.append(sizes)
        longest = sizes.reshape(split.columns, -1).max(axis=1)
        padded_tokens += int(longest.sum()) * len(chosen)
        labels.append(None if split.labels is None else torch.from_numpy(split.labels[chosen]))

    all_lengths = np.concatenate(lengths)
    cu_seqlens = np.zeros(len(all_lengths) + 1, dtype=np.int32)
    np.cumsum(all_lengths, out=cu_seqlens[1:])
    input_ids = torch.from_numpy(np.concatenate(tokens))
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(_ranges(np.zeros_like(all_lengths), all_lengths)),
        token_type_ids=torch.zeros_like(input_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(all_lengths.max()),
        task_offsets=_offsets(lengths),
        token_offsets=_offsets(tokens),
        labels=tuple(labels),
        examples=tuple(len(chosen) for chosen in picks),
        columns=tuple(split.columns for split in splits),
        padded_tokens=padded_tokens,
    )


def _ranges(starts: Indices, sizes: Indices) -> Indices:
    """Return ``starts[i], starts[i] + 1, …`` (``sizes[i]`` numbers) for one i after the other."""
    ends = np.cumsum(sizes)
    return np.arange(ends[-1]) + np.repeat(starts - ends + sizes, sizes)


def _offsets(parts: Sequence[npt.NDArray[np.int64]]) -> tuple[int, ...]:
    return (0, *np.cumsum([len(part) for part in parts]).tolist())
