"""Lengths of queries and keys for the tests of attention, and what they must give."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention.attention import attention_reference
from kernels.attention.attention_options import AttentionOptions
from kernels.dropout.dropout import _factors, dropout_words

# Both sides of every block of queries, keys or rows, in C++ and in Triton.
EDGES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 300]
# More queries than keys: flash-attn's own cases, and those on both sides of the first block.
FEW_KEYS = [(76, 1), (34, 1), (146, 1), (65, 1), (76, 2), (300, 20), (64, 1), (40, 20)]
EMPTY = [(0, 0), (1, 3), (0, 0), (1, 5), (70, 0), (0, 130)]
# Sequences of self-attention on both sides of a run's 64 rows, counted from a multiple of 4.
RUNS = {
    "ones": [1] * 70,
    "about to fill a run": [61, 62, 63, 64, 65],
    "from the second of four rows": [1, 60, 1, 61, 1, 62, 5, 63],
    "long and short": [70, 3, 61, 130, 1, 0, 5, 64, 20],
    "empty ones between": [0, 0, 7, 0, 57, 0, 0, 64, 0, 62],
    "one": [33],
    "none": [],
}
# Of a token, uneven ones, a model's, of one side, and wider than any sequence here.
WINDOWS = [(0, 0), (1, 0), (0, 1), (3, 5), (64, 64), (-1, 2), (2, -1), (200, 1000)]
# On both sides of those, of the blocks that they reach into, and of unlike lengths.
WINDOW_PAIRS = [
    *((length, length) for length in (1, 2, 3, 4, 6, 9, 64, 65, 66, 128, 129, 130, 193, 258)),
    *((5, 300), (300, 5), (66, 131), (131, 66), (200, 263), (263, 200), (0, 3), (3, 0)),
]
# Keys behind a sequence that nobody sees, as in a padded batch of torch's: with one key, too, its
# products are then those of matrices, which sum as the kernels do.
PADDING = 8

Pair = tuple[int, int]
Window = tuple[int, int]
NO_WINDOW = (-1, -1)


def drawn_pairs(count: int, seed: int) -> list[Pair]:
    """Pairs of lengths of queries and keys, half of them at the edges, half anywhere."""
    generator = torch.Generator().manual_seed(seed)

    def draw(largest: int) -> list[int]:
        return torch.randint(largest, (2 * count,), generator=generator).tolist()

    lengths = [
        EDGES[edge] if i % 4 < 2 else anywhere
        for i, (edge, anywhere) in enumerate(zip(draw(len(EDGES)), draw(301), strict=True))
    ]
    return list(zip(lengths[::2], lengths[1::2], strict=True))


def boundaries(lengths: list[int], device: str = "cpu") -> Tensor:
    """The int32 offsets of sequences of these lengths."""
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def factors_between(
    heads: int, queries: range, keys: range, p: float, seed: Tensor, rng_offset: int
) -> Tensor | None:
    """The dropout factors of some rows of the streams: ``[heads, queries, keys + PADDING]``."""
    if p == 0:
        return None
    query = torch.arange(queries.start, queries.stop)[:, None]
    quad = torch.arange(keys.start // 4, (keys.stop + 3) // 4)
    head = torch.arange(heads)[:, None, None]
    words = dropout_words(((query << 32) + quad).expand(heads, -1, -1), int(seed), head, rng_offset)
    of_keys = _factors(words, p).flatten(2)[..., keys.start % 4 :][..., : len(keys)]
    return F.pad(of_keys, (0, PADDING))


def reference_by_sequence(
    pairs: list[Pair],
    streams: tuple[Tensor, Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    causal: bool,
    p: float,
    seed: Tensor,
    rng_offset: int,
    window: Window = NO_WINDOW,
) -> list[Tensor]:
    """Output, log-sum-exp and gradients of q, k and v by plain torch, a sequence at a time.

    ``streams`` are q, k, v and the gradient of the output; the rows behind the last sequence are
    zero in the results, and -inf in the log-sum-exp.
    """
    q, k, v, grad_out = streams
    results = [torch.zeros_like(x, dtype=dtype) for x in (q, q, k, v)]
    out, *grads = results
    lse = torch.full((q.shape[1], len(q)), -torch.inf, dtype=dtype)
    query = key = 0
    for num_queries, num_keys in pairs:
        queries, keys = range(query, query + num_queries), range(key, key + num_keys)
        query, key = queries.stop, keys.stop
        rows = [slice(own.start, own.stop) for own in (queries, keys, keys)]
        leaves = [x[own].to(dtype).requires_grad_() for x, own in zip((q, k, v), rows, strict=True)]
        factors = factors_between(q.shape[1], queries, keys, p, seed, rng_offset)
        cu_seqlens = boundaries([num_queries]), boundaries([num_keys])
        padded = (leaves[0], *(F.pad(x, (0, 0, 0, 0, 0, PADDING)) for x in leaves[1:]))
        own_out, own_lse = attention_reference(
            *(*padded, *cu_seqlens),
            AttentionOptions(q.shape[2] ** -0.5, causal, 0.0, 0, *window),
            factors,
        )
        out[rows[0]], lse[:, rows[0]] = own_out.detach(), own_lse.detach()
        own_grads = torch.autograd.grad(own_out, leaves, grad_out[rows[0]].to(dtype))
        for grad, own, own_grad in zip(grads, rows, own_grads, strict=True):
            grad[own] = own_grad
    return [out, lse, *grads]


def rows_that_meet_none(
    pairs: list[Pair],
    causal: bool,
    num_queries: int,
    num_keys: int,
    window: Window = NO_WINDOW,
) -> tuple[Tensor, Tensor]:
    """Queries that see no key and keys that no query sees, those of no sequence too: two masks.

    Sequences are aligned at their ends, so that both are the first ones.
    """
    left, right = window
    right = 0 if causal else right
    blind, unseen = torch.ones(num_queries, dtype=bool), torch.ones(num_keys, dtype=bool)
    query = key = 0
    for queries, keys in pairs:
        sees_none = max(0, queries - keys - right) if right >= 0 and keys > 0 else 0
        meets_none = max(0, keys - queries - left) if left >= 0 else 0
        blind[query + sees_none : query + queries] = keys == 0
        unseen[key + meets_none : key + keys] = queries == 0
        query, key = query + queries, key + keys
    return blind, unseen


def fill_rows_that_meet_none(
    pairs: list[Pair],
    causal: bool,
    streams: tuple[Tensor, Tensor, Tensor, Tensor],
    value: float,
    window: Window = NO_WINDOW,
) -> None:
    """Write a value to them, in q, k, v and the gradient of the output."""
    q, k, v, grad_out = streams
    masks = rows_that_meet_none(pairs, causal, len(q), len(k), window)
    blind, unseen = (mask.to(q.device) for mask in masks)
    for x, rows in ((q, blind), (k, unseen), (v, unseen), (grad_out, blind)):
        x[rows] = value


def assert_structure(
    pairs: list[Pair], causal: bool, results: list[Tensor], window: Window = NO_WINDOW
) -> None:
    """Zeros exactly where a query sees no key or a key no query, and nothing else but numbers."""
    out, lse, grad_q, grad_k, grad_v = results
    blind, unseen = rows_that_meet_none(pairs, causal, len(out), len(grad_k), window)
    assert torch.equal(lse.isneginf(), blind.expand_as(lse))
    assert lse[:, ~blind].isfinite().all()
    for x, zero in ((out, blind), (grad_q, blind), (grad_k, unseen), (grad_v, unseen)):
        assert x.isfinite().all()
        assert x[zero].count_nonzero() == 0
