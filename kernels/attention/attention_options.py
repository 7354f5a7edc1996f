"""The options of attention, their defaults and their checks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout.dropout import check_dropout, new_seed

# What flash-attn can do and these functions cannot, and the value that asks for none of it.
_UNSUPPORTED = {"softcap": 0.0, "alibi_slopes": None, "block_table": None}
_UNUSED = tuple(_UNSUPPORTED.values())

NO_LIMIT = 2**31 - 2
"""A window as wide as this hides nothing: no rows of a stream are farther apart."""


class AttentionOptions(NamedTuple):
    """Options of attention, besides its tensors and boundaries.

    The operators take the fields, in this order, as their last arguments: ``*options`` there, and
    ``AttentionOptions(*arguments)`` back.

    Attributes:
        softmax_scale: multiplies the scores, finite.
        causal: whether a query sees only the keys up to its own position.
        dropout_p: probability to drop an attention weight.
        rng_offset: distinguishes dropouts that share a seed.
        window_left: how many keys before its own position a query sees, -1 for all.
        window_right: how many behind it, -1 for all.
        seed: of dropout, int64, one element, or None without dropout.  The only tensor, and last:
            autograd saves it apart from the others.
    """

    softmax_scale: float
    causal: bool = False
    dropout_p: float = 0.0
    rng_offset: int = 0
    window_left: int = -1
    window_right: int = -1
    seed: Tensor | None = None

    @classmethod
    def of(
        cls,
        q: Tensor,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        block_table: Tensor | None,
        seed: Tensor | None,
        rng_offset: int,
    ) -> "AttentionOptions":
        """The options of a call of the public functions on queries ``q [..., D]``.

        Raises:
            NotImplementedError: flash-attn can do it, and these functions cannot.
            ValueError: as `check`, or a window that is not two integers of at least -1.
        """
        given = (softcap, alibi_slopes, block_table)
        if given != _UNUSED:
            unsupported = (
                name
                for name, value in zip(_UNSUPPORTED, given, strict=True)
                if value != _UNSUPPORTED[name]
            )
            raise NotImplementedError(f"{next(unsupported)}: not supported by this attention")
        if softmax_scale is None:
            softmax_scale = float(q.shape[-1] ** -0.5)
        if seed is None and 0 < dropout_p < 1:
            seed = new_seed(q.device)
        window = _window(window_size)
        options = cls(softmax_scale, causal, dropout_p, rng_offset, *window, seed)
        options.check(q.device)
        return options

    def check(self, device: torch.device) -> None:
        """Check the options of an operator whose tensors are on ``device``.

        Raises:
            ValueError: one is out of range, or the seed is of the wrong dtype, shape or device.
        """
        check_dropout(self.dropout_p, self.seed, self.rng_offset, device)
        if not abs(self.softmax_scale) < math.inf:
            raise ValueError(f"softmax_scale: expected a finite number, got {self.softmax_scale}")
        for name in ("window_left", "window_right"):
            keys = getattr(self, name)
            if keys < -1:
                raise ValueError(f"{name}: expected a number of keys, or -1 for all, got {keys}")

    def limits(self) -> tuple[int, int] | None:
        """How many keys before and behind its own position a query sees; None where it sees all.

        ``causal`` is part of it, and `NO_LIMIT` stands for all of a side.
        """
        left, right = (
            NO_LIMIT if keys == -1 else min(keys, NO_LIMIT)
            for keys in (self.window_left, self.window_right)
        )
        if self.causal:
            right = 0
        return None if left == right == NO_LIMIT else (left, right)


def _window(window_size: tuple[int, int]) -> tuple[int, int]:
    """Both limits of a window, integers that 64 bits hold.

    Raises:
        ValueError: it is not two integers of at least -1.
    """
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not is_pair or not all(_is_limit(keys) for keys in window_size):
        got = type(window_size).__name__
        if isinstance(window_size, (tuple, list)):
            values = (
                str(x) if isinstance(x, (int, float)) else type(x).__name__ for x in window_size
            )
            got = f"({', '.join(values)})"
        raise ValueError(
            "window_size: expected two integers (left, right), numbers of keys or -1 for all, "
            f"got {got}"
        )
    left, right = window_size
    return min(left, NO_LIMIT), min(right, NO_LIMIT)


def _is_limit(keys: object) -> bool:
    return isinstance(keys, int) and not isinstance(keys, bool) and keys >= -1
