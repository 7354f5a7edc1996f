"""Packed attention against float64, forward and backward, and its edges."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import (
    check_cu_seqlens,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
)
from kernels.attention.attention import attention_reference, visible_keys
from kernels.attention.attention_options import AttentionOptions
from kernels.dropout.dropout import attention_dropout_factors

from .attention_lengths import WINDOW_PAIRS, WINDOWS
from .conftest import untouched_memory
from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(0x123456789ABCDEF)
TAIL = 5  # rows behind the last sequence
MIXES = {
    "sentences": [18, 1, 0, 23, 17, 60, 3],
    "around the tiles of 64 queries and 512 keys": [64, 65, 0, 513],
    "one token and two": [1, 2, 1],
    "empty sequences": [0, 0],
    "no sequence": [],
}
# The BERTs' widths, one that fills no vector, and one that leaves a number alone in its pair.
WIDTHS = [32, 64, 96, 128, 20, 33]


def boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def qkv_stream(
    lengths: list[int], dtype: torch.dtype, heads: int = 2, width: int = 32, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(lengths) + TAIL, 3, heads, width)
    return torch.randn(shape, generator=generator).to(dtype)


def run(
    function: Callable[[Tensor], Tensor], qkv: Tensor, tail: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Output and gradient of qkv; rows behind the last sequence hold ``tail``."""
    qkv = qkv.clone()
    qkv[-TAIL:] = tail
    qkv.requires_grad_()
    out = function(qkv)
    generator = torch.Generator().manual_seed(len(qkv))
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_out[-TAIL:] = tail
    out.backward(grad_out)
    assert qkv.grad is not None
    return out.detach(), qkv.grad


def check(
    lengths: list[int],
    dtype: torch.dtype,
    width: int,
    causal: bool,
    p: float,
    scale: float | None = None,
) -> None:
    """The 2x rule for output and gradient, and zeros behind the last sequence, whatever is there.

    Its errors are the largest of many tokens: those of a few sentences are a matter of luck.
    """
    cu_seqlens, longest = boundaries(lengths), max(lengths, default=0)
    total = sum(lengths) + TAIL
    heads = 2 if total < 500 else 1
    factors = attention_dropout_factors(heads, total, total, p, SEED, 7) if p else None

    def reference(qkv: Tensor) -> Tensor:
        options = AttentionOptions(width**-0.5 if scale is None else scale, causal)
        return attention_reference(*qkv.unbind(1), cu_seqlens, cu_seqlens, options, factors)[0]

    def kernel(qkv: Tensor) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, longest, p, scale, causal, seed=SEED, rng_offset=7
        )

    num_streams = min(12, 2 + 1500 // total)
    streams = [qkv_stream(lengths, dtype, heads, width, seed) for seed in range(num_streams)]
    results = [run(kernel, qkv, torch.nan) for qkv in streams]
    torchs = [run(reference, qkv) for qkv in streams]
    exact = [run(reference, qkv.double()) for qkv in streams]
    for tensors in zip(*map(zip, results, torchs, exact), strict=True):
        assert_within_twice(*(torch.stack(parts) for parts in zip(*tensors, strict=True)))
    for result in results:
        for tensor in result:
            assert tensor[sum(lengths) :].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES.keys())
def test_lengths(lengths: list[int], causal: bool, dtype: torch.dtype) -> None:
    check(lengths, dtype, 32, causal, 0.0)
    check(lengths, dtype, 32, causal, 0.2)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, causal: bool, dtype: torch.dtype) -> None:
    check(MIXES["sentences"], dtype, width, causal, 0.1)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_scales_and_with_them_large_scores(scale: float) -> None:
    check(MIXES["sentences"], torch.float32, 32, False, 0.0, scale)
    check(MIXES["around the tiles of 64 queries and 512 keys"], torch.float32, 32, True, 0.0, scale)


def test_a_sequence_of_8192_beside_short_ones() -> None:
    """Few queries have a gradient, so that theirs is all that the keys' and values' consist of."""
    lengths = [7, 8192, 0, 30, 1]
    cu_seqlens, some = boundaries(lengths), 7 + torch.tensor([0, 1, 63, 64, 4095, 8191])
    qkv = qkv_stream(lengths, torch.float32, heads=1)
    grad_some = torch.randn(len(some), 1, 32)

    def rows(dtype: torch.dtype) -> list[Tensor]:
        """Plain torch: the queries of `some` against all keys of their sequence."""
        leaf = qkv.to(dtype).requires_grad_()
        q, k, v = leaf[7:8199, :, 0].unbind(1)
        scores = q[some - 7] @ k.T * 32**-0.5
        out = (scores.softmax(-1) @ v)[:, None]
        (grad,) = torch.autograd.grad(out, leaf, grad_some.to(dtype))
        return [out.detach(), scores.logsumexp(-1).detach(), grad]

    leaf = qkv.clone().requires_grad_()
    out, lse, _ = flash_attn_varlen_qkvpacked_func(leaf, cu_seqlens, 8192, return_attn_probs=True)
    (grad,) = torch.autograd.grad(out[some], leaf, grad_some)
    found = [out[some].detach(), lse[0, some], grad]
    for tensors in zip(found, rows(torch.float32), rows(torch.float64), strict=True):
        assert_within_twice(*tensors)


def banded_attention(
    qkv: Tensor, window: tuple[int, int], grad_out: Tensor, dtype: torch.dtype, chunk: int = 256
) -> list[Tensor]:
    """Output, log-sum-exp and gradient of one sequence by plain torch, some queries at a time."""
    leaf = qkv.to(dtype).requires_grad_()
    outs, lses = [], []
    for start in range(0, len(qkv), chunk):
        queries = torch.arange(start, min(start + chunk, len(qkv)))
        first, last = max(0, start - window[0]), int(queries[-1]) + window[1] + 1
        q, (k, v) = leaf[queries, 0], leaf[first:last, 1:].unbind(1)
        apart = torch.arange(first, first + len(k)) - queries[:, None]
        scores = torch.einsum("ihd,jhd->hij", q, k) * qkv.shape[-1] ** -0.5
        scores = scores.masked_fill((apart < -window[0]) | (apart > window[1]), -torch.inf)
        outs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
        lses.append(scores.logsumexp(-1))
    out = torch.cat(outs)
    (grad,) = torch.autograd.grad(out, leaf, grad_out.to(dtype))
    return [out.detach(), torch.cat(lses, 1).detach(), grad]


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("length", "window"), [(700, (64, 64)), (700, (3, 100)), (700, (130, 0)), (8192, (64, 64))]
)
def test_a_window_of_a_long_sequence(
    length: int, window: tuple[int, int], dtype: torch.dtype
) -> None:
    """Its errors are the largest of several streams, as in `check`."""
    heads = 2 if length < 1000 else 1
    lengths, tokens = [5, length], slice(5, 5 + length)
    found: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(4):
        qkv = qkv_stream(lengths, dtype, heads, seed=seed)
        leaf = qkv.clone().requires_grad_()
        out, lse, _ = flash_attn_varlen_qkvpacked_func(
            leaf, boundaries(lengths), length, window_size=window, return_attn_probs=True
        )
        grad_out = torch.randn(out.shape).to(dtype)
        (grad,) = torch.autograd.grad(out, leaf, grad_out)
        own = (qkv[tokens], window, grad_out[tokens])
        found[0].append([out[tokens].detach(), lse[:, tokens], grad[tokens]])
        found[1].append(banded_attention(*own, dtype))
        found[2].append(banded_attention(*own, torch.float64))
    for parts in zip(*(zip(*one, strict=True) for one in found), strict=True):
        assert_within_twice(*map(torch.stack, parts))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True])
def test_the_keys_that_a_window_shows(causal: bool, window: tuple[int, int]) -> None:
    """By flash-attn's words, key by key; what is wider than all sequences hides nothing."""
    pairs = [pair for pair in WINDOW_PAIRS if max(pair) < 70] + [(0, 0), (9, 4), (4, 9)]
    lengths_q, lengths_k = zip(*pairs, strict=True)
    given = boundaries(lengths_q), boundaries(lengths_k), sum(lengths_q) + 1, sum(lengths_k) + 1
    options = AttentionOptions(1.0, causal, 0.0, 0, *window)
    seen = visible_keys(*given, options)
    left, right = window[0], 0 if causal else window[1]
    expected = torch.zeros_like(seen)
    for (num_q, num_k), query, key in zip(pairs, *(x.tolist() for x in given[:2]), strict=False):
        for i in range(num_q):
            for j in range(num_k):
                place = i + num_k - num_q
                expected[query + i, key + j] = (left < 0 or place - left <= j) and (
                    right < 0 or j <= place + right
                )
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("wide", [2**31 - 2, 2**31, 2**62, 10**30])
def test_a_window_wider_than_a_stream_is_none(wide: int) -> None:
    qkv, cu = qkv_stream([40, 150], torch.float32), boundaries([40, 150])
    for window, limited in (((wide, wide), (-1, -1)), ((3, wide), (3, -1)), ((wide, 3), (-1, 3))):
        results = [
            run(lambda x, w=w: flash_attn_varlen_qkvpacked_func(x, cu, 150, window_size=w), qkv)
            for w in (window, limited)
        ]
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


def test_causal_is_a_window_without_later_keys() -> None:
    qkv, cu = qkv_stream([40, 150], torch.float32), boundaries([40, 150])
    for left in (-1, 7):
        results = [
            run(lambda x, o=o: flash_attn_varlen_qkvpacked_func(x, cu, 150, **o), qkv)
            for o in (
                {"window_size": (left, 0)},
                {"window_size": (left, 9), "causal": True},
                {"window_size": (left, -1), "causal": True},
            )
        ]
        for one, *others in zip(*results, strict=True):
            assert all(torch.equal(one, other) for other in others)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_tiles_outside_of_a_window_are_not_visited(value: float) -> None:
    """A zero probability times NaN is NaN, so that what is near alone was multiplied.

    The tokens 600 to 603 reach, through the window and by sharing tiles with tokens that it does
    not show, the outputs of a tile of 64 queries and its window on each side, and of those, again
    by the window and tiles, gradients; 320 tokens on either side hold all of it.
    """
    qkv = qkv_stream([1200], torch.float32)
    clean, corrupted = qkv.clone(), qkv.clone()
    corrupted[600:604] = value
    far = torch.cat([torch.arange(280), torch.arange(924, 1200)])

    def windowed(qkv: Tensor) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(qkv, boundaries([1200]), 1200, window_size=(64, 64))

    for one, other in zip(run(windowed, clean), run(windowed, corrupted), strict=True):
        assert not other[600:604].isfinite().all()
        assert torch.equal(one[far], other[far])


def test_no_tokens() -> None:
    qkv = torch.randn(0, 3, 2, 32, requires_grad=True)
    out = flash_attn_varlen_qkvpacked_func(qkv, boundaries([]), 0)
    assert out.shape == (0, 2, 32)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    keys = torch.randn(5, 2, 32)
    nothing = flash_attn_varlen_func(
        *(keys[:0], keys, keys), *(boundaries([0]), boundaries([5])), *(0, 5)
    )
    assert nothing.shape == (0, 2, 32)


def test_more_sequences_than_a_grid_has_rows() -> None:
    """70,000 sequences, nearly all of them empty, agree with the ones that are not."""
    lengths = [0] * 70_000
    lengths[123], lengths[66_000], lengths[-1] = 5, 1, 9
    qkv = qkv_stream([5, 1, 9], torch.float32)
    few, many = (
        run(lambda qkv, cu=cu: flash_attn_varlen_qkvpacked_func(qkv, cu, 9), qkv)
        for cu in (boundaries([5, 1, 9]), boundaries(lengths))
    )
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other)


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^28 elements apart, so that the last ones start behind the 2^31st element.

    The memory between them is never touched, and so is never there.
    """
    lengths, row = [5, 6], 2**28
    with untouched_memory():
        far = torch.empty(11 * row, dtype=torch.float16)
    qkv = far.as_strided((11, 3, 2, 32), (row, 64, 32, 1))
    qkv.copy_(qkv_stream(lengths, torch.float16)[:11])
    near = qkv.contiguous()
    for one, other in zip(
        *(run_without_a_copy(x, boundaries(lengths)) for x in (qkv, near)), strict=True
    ):
        assert torch.equal(one, other)


def run_without_a_copy(qkv: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = flash_attn_varlen_qkvpacked_func(leaf, cu_seqlens, 6)
    return out.detach(), torch.autograd.grad(out, leaf, torch.ones_like(out))[0]


@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_lengths(causal: bool) -> None:
    """Causal attention is aligned at the ends; a query before all keys gives zeros."""
    lengths_q, lengths_k = [3, 5, 0, 70, 4], [7, 2, 4, 130, 0]
    cu_q, cu_k = boundaries(lengths_q), boundaries(lengths_k)
    # Scores of ordinary size: the rounding of one very large one would decide the largest error.
    inputs = [
        [
            0.7 * torch.randn(sum(lengths) + TAIL, 2, 32)
            for lengths in (lengths_q, lengths_k, lengths_k)
        ]
        for _ in range(50)
    ]

    def reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention_reference(q, k, v, cu_q, cu_k, AttentionOptions(32**-0.5, causal))

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options = {"causal": causal, "return_attn_probs": True}
        return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 70, 130, **options)[:2]

    def results(function: Callable, dtype: torch.dtype) -> list[Tensor]:
        """Output, log-sum-exp and gradients, those of all inputs stacked."""
        per_input = []
        for qkv in inputs:
            qkv_cast = [x.detach().to(dtype).requires_grad_() for x in qkv]
            out, lse = function(*qkv_cast)
            torch.manual_seed(len(per_input))
            grads = torch.autograd.grad(out, qkv_cast, torch.randn(out.shape).to(dtype))
            per_input.append((out, lse, *grads))
        return [torch.stack(parts) for parts in zip(*per_input, strict=True)]

    found, torchs = results(kernel, torch.float32), results(reference, torch.float32)
    exact = results(reference, torch.float64)
    sees_nothing = ~exact[1].isfinite()
    assert sees_nothing[0, 0].sum() == 4 + TAIL + (3 if causal else 0)
    assert torch.equal(found[1].isneginf(), sees_nothing)
    assert found[0].transpose(1, 2)[sees_nothing].count_nonzero() == 0
    for parts in (found, torchs, exact):
        parts[1] = parts[1].masked_fill(sees_nothing, 0)
    for tensors in zip(found, torchs, exact, strict=True):
        assert_within_twice(*tensors)


def test_separate_tensors_of_any_stride_agree_with_one_packed() -> None:
    lengths = MIXES["sentences"]
    cu_seqlens = boundaries(lengths)
    qkv = qkv_stream(lengths, torch.float32)
    q, k, v = (part.transpose(0, 1).contiguous().transpose(0, 1) for part in qkv.unbind(1))
    assert not q.is_contiguous()
    packed = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 60)
    apart = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 60, 60)
    assert torch.equal(packed, apart)


def test_a_gradient_of_any_stride() -> None:
    cu_seqlens = boundaries([18, 5])
    qkv = qkv_stream([18, 5], torch.float32).requires_grad_()
    out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 18)
    (expanded,) = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    (dense,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_to_the_bit_whatever_the_threads(dtype: torch.dtype) -> None:
    lengths = MIXES["around the tiles of 64 queries and 512 keys"]
    qkv = qkv_stream(lengths, dtype)

    def kernel(qkv: Tensor) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(qkv, boundaries(lengths), 513, 0.1, seed=SEED)

    first = run(kernel, qkv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = run(kernel, qkv)
    torch.set_num_threads(threads)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_nan_stays_within_its_sequence_and_head() -> None:
    lengths = [18, 30, 5]
    qkv = qkv_stream(lengths, torch.float32)
    qkv[20, 0, 1, 3] = torch.nan
    out = flash_attn_varlen_qkvpacked_func(qkv, boundaries(lengths), 30)
    assert out[20, 1].isnan().all()
    out[20, 1] = 0
    assert out.isfinite().all()


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_neighbours_in_memory_are_not_read(value: float, dtype: torch.dtype) -> None:
    """Lengths and width are odd, so that the last of each would make pairs with what is behind."""
    lengths = [17, 1, 31, 5]
    clean = qkv_stream(lengths, dtype, heads=3, width=33)
    corrupted = clean.clone()
    corrupted[18:49, :, 1] = value
    p, cu_seqlens = 0.1, boundaries(lengths)
    (out, grad), (other_out, other_grad) = (
        run(lambda x: flash_attn_varlen_qkvpacked_func(x, cu_seqlens, 31, p, seed=SEED), qkv)
        for qkv in (clean, corrupted)
    )
    for one, other in ((out[:, None], other_out[:, None]), (grad, other_grad)):
        assert not other[18:49, :, 1].isfinite().any()
        other[18:49, :, 1] = one[18:49, :, 1]
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_scores_do_not_overflow(dtype: torch.dtype) -> None:
    lengths = [18, 30]
    qkv = qkv_stream(lengths, dtype) * 40
    out, grad = run(lambda qkv: flash_attn_varlen_qkvpacked_func(qkv, boundaries(lengths), 30), qkv)
    assert out.isfinite().all()
    assert grad.isfinite().all()


def test_float64_is_computed_in_float64() -> None:
    qkv = qkv_stream([4, 3], torch.float64, heads=1, width=4)[:7].requires_grad_()

    def function(qkv: Tensor) -> Tensor:
        return flash_attn_varlen_qkvpacked_func(qkv, boundaries([4, 3]), 4, 0.3, seed=SEED)

    assert torch.autograd.gradcheck(function, qkv)


def test_an_unseeded_call_follows_torchs_generator() -> None:
    qkv = qkv_stream([18], torch.float32)

    def drop() -> Tensor:
        return flash_attn_varlen_qkvpacked_func(qkv, boundaries([18]), 18, 0.5)

    torch.manual_seed(1)
    first, second = drop(), drop()
    torch.manual_seed(1)
    assert torch.equal(drop(), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([1, 8], "start at 0"),
        ([0, 5, 3, 8], "ascending"),
        ([0, 9], "within the 8 rows"),
    ],
)
def test_boundaries_that_cannot_be_are_refused(cu_seqlens: list[int], message: str) -> None:
    qkv = torch.randn(8, 3, 2, 32)
    boundaries = torch.tensor(cu_seqlens, dtype=torch.int32)
    with pytest.raises(ValueError, match=f"cu_seqlens.*{message}"):
        flash_attn_varlen_qkvpacked_func(qkv, boundaries, 8)
    with pytest.raises(ValueError, match=f"cu_seqlens.*{message}"):
        flash_attn_varlen_qkvpacked_func(qkv.double(), boundaries, 8)
    with pytest.raises(ValueError, match=f"cu: .*{message}"):
        check_cu_seqlens("cu", boundaries, 8)


QKV = torch.randn(8, 3, 2, 32)
Q, CU = QKV[:, 0], boundaries([8])


@pytest.mark.parametrize(
    ("qkv", "cu_seqlens", "options", "message"),
    [
        (QKV[:, :2], CU, {}, "qkv: expected"),
        (QKV.int(), CU, {}, "qkv: expected a floating"),
        (QKV.transpose(2, 3), CU, {}, "contiguous last dimension"),
        (QKV[..., :0], CU, {}, "at least one column"),
        (QKV, CU.long(), {}, "cu_seqlens: expected int32"),
        (QKV, CU[None], {}, "cu_seqlens: expected int32"),
        (QKV, CU[:0], {}, "cu_seqlens: expected int32"),
        (QKV, CU.to("meta"), {}, "cu_seqlens: expected contiguous on cpu"),
        (QKV, CU, {"window_size": (3, 2.0)}, r"window_size: .* got \(3, 2\.0\)"),
        (QKV, CU, {"window_size": 3}, "window_size: .* got int"),
        (QKV, CU, {"dropout_p": 1.0}, "probability"),
        (QKV, CU, {"dropout_p": 0.1, "seed": torch.tensor(0.5)}, "seed"),
    ],
)
def test_packed_arguments_that_do_not_fit_are_named(
    qkv: Tensor, cu_seqlens: Tensor, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 8, **options)


@pytest.mark.parametrize(
    ("k", "v", "cu_seqlens_k", "message"),
    [
        (Q[:, :1], Q[:, :1], CU, "k: expected heads"),
        (Q[..., :16], Q[..., :16], CU, "k: expected heads and width"),
        (Q.mT.contiguous().mT, Q, CU, "k: expected a contiguous last dimension"),
        (Q.half(), Q, CU, "k: expected a floating dtype"),
        (Q, Q[:7], CU, "v: expected the shape of k"),
        (Q, Q.to("meta"), CU, "v: expected on cpu"),
        (Q, Q, boundaries([4, 4]), "cu_seqlens_k: expected as many sequences"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(Q, k, v, CU, cu_seqlens_k, 8, 8)


@pytest.mark.parametrize(
    "option",
    [
        {"softcap": 30.0},
        {"alibi_slopes": torch.ones(2)},
        {"block_table": torch.zeros(1, 1)},
    ],
)
def test_what_is_not_supported_says_so(option: dict) -> None:
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        flash_attn_varlen_func(Q, Q, Q, CU, CU, 8, 8, **option)
    if "block_table" not in option:  # which flash-attn's packed function does not take
        with pytest.raises(NotImplementedError, match=next(iter(option))):
            flash_attn_varlen_qkvpacked_func(QKV, CU, 8, **option)
