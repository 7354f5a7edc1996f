"""Dropout whose mask is a function of a seed and each element's position.

    y_i = x_i f_i,    f_i = 0 with probability p, else 1 / (1 - p)

The random word behind ``f_i`` comes from Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", SC 2011), a counter-based generator::

    key     = the 64-bit seed
    counter = (quad, low word), (quad, high word), head, rng_offset

One call gives the words of the four elements of a quad.  Here the quad is ``i // 4`` and head is 0;
in attention the two words of quad are ``key // 4`` and ``query``, rows of the packed streams.  An
element is kept when its word is at least ``floor(p * 2**32)``, so the probability to keep one is
exact to 2**-32, and backward passes compute the mask again instead of reading it.

The seed is a tensor on the device, so that a CUDA graph can replay with another one.  Dropouts that
share a seed have different ``rng_offset``, numbers below 2**32.
"""

from typing import Any

import torch
from torch import Tensor

from .. import _extension  # noqa: F401  (registers the operator)
from ..philox import WORD, philox_words
from ..registration.backend import declare, register_fake
from ..registration.deprecation import renamed_argument
from ..registration.differentiation import register_derivative
from ..registration.validation import DTYPES, check_data, check_kernel_dtype

# ---- reference ----------------------------------------------------------------------------------


def dropout_words(quad: Tensor, seed: int, head: Tensor | int, rng_offset: int) -> Tensor:
    """The four words of each quad, int64 ``[*quad.shape, 4]``."""
    counter = (quad & WORD, (quad >> 32) & WORD, head + 0 * quad, rng_offset + 0 * quad)
    return philox_words(counter, seed)


def _factors(words: Tensor, p: float) -> Tensor:
    return (words >= int(p * 2**32)) / (1 - p)


def dropout_factors(count: int, p: float, seed: Tensor, rng_offset: int) -> Tensor:
    """The factors ``f`` of the first ``count`` elements: ``[count]``, float32, on seed's device."""
    quad = torch.arange((count + 3) // 4, device=seed.device)
    return _factors(dropout_words(quad, int(seed), 0, rng_offset), p).flatten()[:count]


def attention_dropout_factors(
    heads: int, queries: int, keys: int, p: float, seed: Tensor, rng_offset: int
) -> Tensor:
    """The factors of all pairs of rows in attention: ``[heads, queries, keys]``, float32."""
    head = torch.arange(heads, device=seed.device)[:, None, None]
    query = torch.arange(queries, device=seed.device)[:, None]
    quad = (query << 32) + torch.arange((keys + 3) // 4, device=seed.device)
    words = dropout_words(quad.expand(heads, -1, -1), int(seed), head, rng_offset)
    return _factors(words, p).flatten(2)[..., :keys]


# ---- registration -------------------------------------------------------------------------------


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed, ctx.rng_offset = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (seed,) = ctx.saved_tensors
    return torch.ops.superbert.dropout(grad, ctx.p, seed, ctx.rng_offset), None, None, None


@torch.library.impl("superbert::dropout", "CUDA")
def _cuda(x: Tensor, p: float, seed: Tensor, rng_offset: int) -> Tensor:
    from . import dropout_triton

    check_kernel_dtype("x", x)
    check_data(x=x)
    check_seed(p, seed, rng_offset, x.device)
    return dropout_triton.dropout(x, p, seed, rng_offset)


register_fake("dropout")(_fake)
register_derivative(
    "dropout",
    _backward,
    _setup_context,
    name="dropout",
    instead="torch.nn.functional.dropout, or float64",
)
declare("dropout", cpu="cpp", cuda="triton")


# ---- public -------------------------------------------------------------------------------------


def check_dropout(p: float, seed: Tensor | None, rng_offset: int, device: torch.device) -> None:
    """Raise ValueError where a dropout's arguments cannot be used; values stay on the device."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability: expected 0 <= p < 1, got {p}")
    if not 0 <= rng_offset <= WORD:
        raise ValueError(f"rng_offset: expected 0 <= rng_offset < 2**32, got {rng_offset}")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise ValueError(f"seed: expected one int64 element, got {seed.dtype} {list(seed.shape)}")
    if seed is not None and seed.device != device:
        raise ValueError(f"seed: expected on {device}, got {seed.device}")


def check_seed(p: float, seed: Tensor | None, rng_offset: int, device: torch.device) -> None:
    """Check the arguments of an operator's dropout."""
    check_dropout(p, seed, rng_offset, device)
    check_seed_given(p, seed)


def check_seed_given(p: float, seed: Tensor | None) -> None:
    """Check that dropout has a seed, and that it has data."""
    if p > 0 and seed is None:
        raise ValueError("seed: dropout needs a tensor of one int64")
    check_data(seed=seed)


def new_seed(device: torch.device) -> Tensor:
    """Draw a seed from torch's default generator of the device, without waiting for it."""
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def dropout(
    x: Tensor,
    p: float,
    *,
    training: bool = True,
    seed: Tensor | None = None,
    rng_offset: int = 0,
    stream: int | None = None,
) -> Tensor:
    """Set elements to zero with probability ``p`` and scale the others by ``1 / (1 - p)``.

    Args:
        x: any shape; float32, bfloat16, float16 (or float64, by the reference).
        p: probability to drop an element, ``0 <= p < 1``.
        training: without it, ``x`` comes back as it is.
        seed: int64, one element, on x's device; None draws one from torch's default generator.
        rng_offset: distinguishes dropouts that share a seed.
        stream: the old name of ``rng_offset``, deprecated.

    Returns:
        A tensor like ``x``, contiguous.

    Raises:
        ValueError: an argument out of range, or x or a seed of the wrong dtype or device.
    """
    if stream is not None:
        rng_offset = renamed_argument("stream", stream, "rng_offset", rng_offset, 0)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    check_dropout(p, seed, rng_offset, x.device)
    if p == 0 or not training:
        return x
    seed = new_seed(x.device) if seed is None else seed
    if x.dtype == torch.float64:
        check_data(x=x, seed=seed)
        return x * dropout_factors(x.numel(), p, seed, rng_offset).view(x.shape)
    out: Tensor = torch.ops.superbert.dropout(x, p, seed, rng_offset)
    return out
