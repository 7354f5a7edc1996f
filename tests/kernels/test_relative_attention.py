"""Attention with a bias for each distance against float64, forward and backward, and its edges."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels.attention.attention_options import AttentionOptions
from kernels.attention.relative_attention import relative_attention, relative_attention_reference
from kernels.dropout.dropout import attention_dropout_factors

from .test_attention import DTYPES, MIXES, SEED, TAIL, WIDTHS, boundaries, qkv_stream
from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Function = Callable[[Tensor, Tensor], Tensor]


def biases(heads: int, longest: int, seed: int) -> Tensor:
    """Biases as large as the scores, of distances that no pair of tokens has, too."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, 2 * (longest + 3) - 1, generator=generator)


def run(function: Function, qkv: Tensor, bias: Tensor, tail: float = 0.0) -> list[Tensor]:
    """Output and both gradients; rows behind the last sequence hold ``tail``."""
    qkv = qkv.clone()
    qkv[-TAIL:] = tail
    leaves = qkv.requires_grad_(), bias.clone().requires_grad_()
    out = function(*leaves)
    generator = torch.Generator().manual_seed(len(qkv))
    grad_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    grad_out[-TAIL:] = tail
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


def check(
    lengths: list[int],
    dtype: torch.dtype,
    width: int,
    p: float = 0.0,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
) -> None:
    """The 2x rule; its errors are the largest of many tokens, as in test_attention.py."""
    options = AttentionOptions(width**-0.5, causal, p, 7, *window, seed=SEED if p else None)
    cu_seqlens, longest = boundaries(lengths), max(lengths, default=0)
    total = sum(lengths) + TAIL
    heads = 2 if total < 500 else 1
    factors = attention_dropout_factors(heads, total, total, p, SEED, 7) if p else None

    def reference(qkv: Tensor, bias: Tensor) -> Tensor:
        return relative_attention_reference(qkv, bias, cu_seqlens, options, factors)[0]

    def kernel(qkv: Tensor, bias: Tensor) -> Tensor:
        operator = torch.ops.superbert.relative_attention
        out: Tensor = operator(qkv, bias, cu_seqlens, longest, *options)[0]
        return out

    found: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(min(12, 2 + 1500 // total)):
        qkv, bias = qkv_stream(lengths, dtype, heads, width, seed), biases(heads, longest, seed)
        found[0].append(run(kernel, qkv, bias, torch.nan))
        found[1].append(run(reference, qkv, bias))
        found[2].append(run(reference, qkv.double(), bias.double()))
    for parts in zip(*(zip(*one, strict=True) for one in found), strict=True):
        assert_within_twice(*map(torch.stack, parts))
    for out, grad, _ in found[0]:
        assert out[sum(lengths) :].count_nonzero() == 0
        assert grad[sum(lengths) :].count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", MIXES.values(), ids=MIXES.keys())
def test_lengths(lengths: list[int], dtype: torch.dtype) -> None:
    check(lengths, dtype, 32, 0.0)
    check(lengths, dtype, 32, 0.2)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(MIXES["sentences"], dtype, width, 0.1)


def test_biases_of_zero_are_attention_without() -> None:
    """To the bit, and distances that no pair has get no gradient."""
    lengths = [18, 1, 130]
    qkv, cu_seqlens = qkv_stream(lengths, torch.float32), boundaries(lengths)
    bias = torch.zeros(2, 2 * 200 - 1, requires_grad=True)
    out = relative_attention(qkv, bias, cu_seqlens, 130)
    plain = torch.ops.superbert.attention_qkvpacked(
        qkv, cu_seqlens, 130, *AttentionOptions(32**-0.5)
    )[0]
    assert torch.equal(out, plain)
    (grad,) = torch.autograd.grad(out[: sum(lengths)].square().sum(), bias)
    distance = torch.arange(2 * 200 - 1) - 199
    assert grad[:, distance.abs() >= 130].count_nonzero() == 0
    assert grad[:, distance.abs() < 130].count_nonzero() == 2 * 259


def test_dropout_is_the_operators() -> None:
    lengths = [18, 1, 30]
    qkv, bias, cu_seqlens = (
        qkv_stream(lengths, torch.float32),
        biases(2, 30, 0),
        boundaries(lengths),
    )
    out = relative_attention(qkv, bias, cu_seqlens, 30, 0.3, 0.5, seed=SEED, rng_offset=9)
    options = AttentionOptions(0.5, dropout_p=0.3, rng_offset=9, seed=SEED)
    operator = torch.ops.superbert.relative_attention
    assert torch.equal(out, operator(qkv, bias, cu_seqlens, 30, *options)[0])


@pytest.mark.parametrize("window", [(5, 9), (100, 40), (300, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_within_a_window(causal: bool, window: tuple[int, int]) -> None:
    """The operator takes attention's options: narrow windows, wide ones, later keys hidden."""
    check([7, 301, 64] * 4, torch.float32, 32, 0.0, causal, window)


def test_threads_make_no_difference() -> None:
    lengths = [40, 3, 90, 17, 66] * 4
    qkv, bias, cu_seqlens = (
        qkv_stream(lengths, torch.bfloat16),
        biases(2, 90, 0),
        boundaries(lengths),
    )

    def kernel(qkv: Tensor, bias: Tensor) -> Tensor:
        return relative_attention(qkv, bias, cu_seqlens, 90)

    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            results.append(run(kernel, qkv, bias))
        finally:
            torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_float64_takes_the_reference() -> None:
    qkv, bias = torch.randn(9, 3, 2, 4).double(), torch.randn(2, 17).double()
    cu_seqlens = boundaries([2, 7])
    out = relative_attention(qkv, bias, cu_seqlens, 7, softmax_scale=0.3)
    q, k, v = qkv[2:].transpose(0, 2).unbind(1)
    places = torch.arange(7)
    scores = 0.3 * q @ k.mT + bias[:, places - places[:, None] + 8]
    torch.testing.assert_close(out[2:], (scores.softmax(-1) @ v).transpose(0, 1))
    inputs = qkv.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: relative_attention(*x, cu_seqlens, 7), inputs)


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2, 13), torch.float64, "bias: expected torch.float32"),
        ((2, 12), torch.float32, "an odd number of distances"),
        ((3, 13), torch.float32, r"bias: expected \[2, an odd number"),
        ((13,), torch.float32, r"bias: expected \[2, an odd number"),
        ((2, 11), torch.float32, "bias: expected distances up to 6 to both sides, got 5"),
    ],
)
def test_wrong_biases(shape: tuple[int, ...], dtype: torch.dtype, message: str) -> None:
    qkv, cu_seqlens = torch.randn(9, 3, 2, 4), boundaries([2, 7])
    with pytest.raises(ValueError, match=message):
        relative_attention(qkv, torch.zeros(shape, dtype=dtype), cu_seqlens, 7)


def test_a_short_bias_in_float64() -> None:
    qkv, cu_seqlens = torch.randn(9, 3, 2, 4).double(), boundaries([2, 7])
    with pytest.raises(ValueError, match="bias: expected distances up to 6 to both sides, got 5"):
        relative_attention(qkv, torch.zeros(2, 11).double(), cu_seqlens, 7)


def test_it_is_differentiated_once() -> None:
    qkv = torch.randn(9, 3, 2, 4, requires_grad=True)
    bias, cu_seqlens = torch.zeros(2, 13, requires_grad=True), boundaries([2, 7])
    out = relative_attention(qkv, bias, cu_seqlens, 7)
    grads = torch.autograd.grad(out.square().sum(), (qkv, bias), create_graph=True)
    with pytest.raises(NotImplementedError, match="relative_attention: cannot differentiate twice"):
        grads[1].sum().backward()
