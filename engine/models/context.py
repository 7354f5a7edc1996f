"""The second argument of every layer: ``layer(x, context)``.

A layer that works row by row takes a :class:`RowContext`, which it needs in training alone.  Layers
of an encoder work on the token stream of a batch and take its :class:`Context`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .._kernels import kernels


class TokenStream(Protocol):
    """Description of a packed batch for layers."""

    @property
    def cu_seqlens(self) -> Tensor:
        """``[S + 1]`` int32; sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``."""

    @property
    def max_seqlen(self) -> int:
        """Tokens in the longest sequence, or more."""

    @property
    def attention_plan(self) -> kernels.AttentionPlan | None:
        """Of ``cu_seqlens``, or None, with which each call of attention makes its own on a GPU."""

    @property
    def position_ids(self) -> Tensor:
        """``[T]`` int64, from 0 in every sequence."""

    @property
    def token_type_ids(self) -> Tensor:
        """``[T]`` int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowContext:
    """The context of a layer that works row by row; a row is a token or a pooled vector.

    Attributes:
        segments: the rows of each task; with them the backward pass writes task gradients.  None
            where no task gradients are collected.
        seed: 0-dim int64, the dropout seed of the step; needed in training mode.
    """

    segments: kernels.TaskSegments | None = None
    seed: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Context(RowContext):
    """The context of a layer that works on the T tokens of S sequences, concatenated.

    Attributes:
        cu_seqlens: ``[S + 1]`` int32; sequence s is tokens ``cu_seqlens[s]:cu_seqlens[s + 1]``.
        max_seqlen: tokens in the longest sequence, or more.
        position_ids: ``[T]`` int64, from 0 in every sequence.
        token_type_ids: ``[T]`` int64.
        attention_plan: of ``cu_seqlens``, made once for all layers; None on a CPU.
        adapters: maps a layer's number and its input ``[T, H]`` to the sum that its tasks' adapters
            add to its output; None without adapters.
        lookup_plan: the order in which gradients are added to the rows of tables; None where the
            backward pass finds it, or collects no task gradients.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    position_ids: Tensor
    token_type_ids: Tensor
    attention_plan: kernels.AttentionPlan | None = None
    adapters: Callable[[int, Tensor], Tensor] | None = None
    lookup_plan: kernels.LookupPlan | None = None

    @classmethod
    def of(
        cls,
        batch: TokenStream,
        *,
        segments: kernels.TaskSegments | None = None,
        seed: Tensor | None = None,
        adapters: Callable[[int, Tensor], Tensor] | None = None,
        lookup_plan: kernels.LookupPlan | None = None,
    ) -> "Context":
        """Return the context of a packed batch."""
        return cls(
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            position_ids=batch.position_ids,
            token_type_ids=batch.token_type_ids,
            attention_plan=batch.attention_plan,
            segments=segments,
            seed=seed,
            adapters=adapters,
            lookup_plan=lookup_plan,
        )
