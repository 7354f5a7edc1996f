"""The options of attention, their defaults and their checks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..dropout.dropout import check_dropout, new_seed

# What flash-attn can do and these functions cannot, and the value that asks for none of it.
_UNSUPPORTED = {"window_size": (-1, -1), "softcap": 0.0, "alibi_slopes": None, "block_table": None}
_UNUSED = tuple(_UNSUPPORTED.values())


class AttentionOptions(NamedTuple):
    """Options of attention, besides its tensors and boundaries.

    The operators take the fields, in this order, as their last arguments: ``*options`` there, and
    ``AttentionOptions(*arguments)`` back.

    Attributes:
        softmax_scale: multiplies the scores, finite.
        causal: whether a query sees only the keys up to its own position.
        dropout_p: probability to drop an attention weight.
        rng_offset: distinguishes dropouts that share a seed.
        seed: of dropout, int64, one element, or None without dropout.  The only tensor, and last:
            autograd saves it apart from the others.
    """

    softmax_scale: float
    causal: bool = False
    dropout_p: float = 0.0
    rng_offset: int = 0
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
            ValueError: as `check`.
        """
        given = (tuple(window_size), softcap, alibi_slopes, block_table)
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
        options = cls(softmax_scale, causal, dropout_p, rng_offset, seed)
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
