"""Which task each row of a layer's input belongs to."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Joined(NamedTuple):
    """A batch of all tasks, one after the other along the first dimension.

    Attributes:
        examples: K + 1 offsets.
        tokens: K + 1 offsets in the packed stream, for layers that work on one.
        tokens_given: whether they are the caller's, and not those of the model's last call.
        sizes: the offsets as sizes of tensors, for torch.compile; a list for each stream.
    """

    examples: tuple[int, ...]
    tokens: tuple[int, ...] | None
    tokens_given: bool
    sizes: tuple[list[Tensor], ...]

    @classmethod
    def of(
        cls, examples: tuple[int, ...], tokens: tuple[int, ...] | None, tokens_given: bool
    ) -> "Joined":
        """Return the batch with these offsets."""
        streams = [examples] if tokens is None else [examples, tokens]
        return cls(examples, tokens, tokens_given, tuple(map(_of_sizes, streams)))

    def streams(self) -> list[tuple[int, ...]]:
        """Return the offsets of examples and of tokens, where these are known."""
        if torch.compiler.is_compiling():
            return [_sizes(tensors) for tensors in self.sizes]
        return [self.examples] if self.tokens is None else [self.examples, self.tokens]

    def offsets(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return where each task begins in the flattened rows of a layer's input.

        Args:
            shape: of the input, without the dimension that the layer works on.

        Raises:
            ValueError: the batch does not lie along its first dimension.
        """
        streams = self.streams()
        for stream in streams:
            if shape and shape[0] == stream[-1]:
                inner = math.prod(shape[1:])
                return tuple(inner * offset for offset in stream)
        if self.is_stream(shape):
            return streams[1]
        known = f"{self.examples[-1]} examples"
        if self.tokens is not None:
            known += f" or {self.tokens[-1]} tokens"
        raise ValueError(
            f"input of {list(shape)} rows, expected {known} along the first dimension; "
            "a layer that sees one task only is called within `task`"
        )

    def is_stream(self, shape: Sequence[int]) -> bool:
        """Whether rows of this shape are all tokens, as a stream ``[1, T]``."""
        streams = self.streams()
        return len(streams) > 1 and len(shape) == 2 and shape[0] == 1 and shape[1] == streams[1][-1]


def _of_sizes(offsets: tuple[int, ...]) -> list[Tensor]:
    """Return a tensor without elements for each offset but the first, which is 0, of its size.

    Of the integers that a mode holds torch.compile makes constants, of sizes it does not.
    """
    return [torch.empty(0, offset, device="cpu") for offset in offsets[1:]]


def _sizes(tensors: list[Tensor]) -> tuple[int, ...]:
    return (0, *(tensor.shape[1] for tensor in tensors))


class Single(NamedTuple):
    """A batch of one task."""

    task: int
    num_tasks: int

    def offsets(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return where each task begins in the flattened rows of a layer's input."""
        return (0,) * (self.task + 1) + (math.prod(shape),) * (self.num_tasks - self.task)
