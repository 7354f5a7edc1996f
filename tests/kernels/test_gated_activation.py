"""GEGLU and SwiGLU: values and gradients against float64, tails, ugly inputs, dropout."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import dropout, geglu, swiglu
from kernels.gated_activation.gated_activation import (
    GELU,
    GELU_TANH,
    SILU,
    gated_activation_reference,
)

from .gated_tails import tail_of
from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
FUNCTIONS: dict[int, Callable[..., Tensor]] = {
    GELU: geglu,
    GELU_TANH: partial(geglu, approximate="tanh"),
    SILU: swiglu,
}
ACTIVATIONS = pytest.mark.parametrize("activation", FUNCTIONS, ids=["gelu", "gelu_tanh", "silu"])
SEED = torch.tensor(-0x123456789ABCDEF)


def both(x: Tensor, grad_out: Tensor, function: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output and gradient."""
    leaf = x.detach().clone().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, grad_out)]


def assert_right(inputs: list[Tensor], activation: int) -> None:
    """Compare the largest errors of all inputs: those of few elements are a matter of luck."""

    def plain(y: Tensor) -> Tensor:
        return gated_activation_reference(y, activation)

    found, torchs, exact = [], [], []
    for x in inputs:
        grad_out = torch.randn(*x.shape[:-1], x.shape[-1] // 2).to(x.dtype)
        found.append(both(x, grad_out, FUNCTIONS[activation]))
        assert all(part.dtype == x.dtype and part.is_contiguous() for part in found[-1])
        torchs.append(both(x, grad_out, plain))
        exact.append(both(x.double(), grad_out.double(), plain))
    for part in range(2):  # outputs, then gradients
        results = (torch.stack([pair[part] for pair in pairs]) for pairs in (found, torchs, exact))
        assert_within_twice(*results)


@pytest.mark.usefixtures("vector_unit")
@DTYPES
# Less than a vector, around one, around a block of 1024, ModernBERT's; one row and several threads.
@pytest.mark.parametrize(
    "shape", [(1, 2), (5, 6), (1, 30), (3, 34), (2, 2050), (40, 2304), (2, 3, 10), (14,)], ids=str
)
@ACTIVATIONS
def test_values_and_gradients(activation: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    draws = 8 if torch.Size(shape).numel() < 100 else 1
    assert_right([(2 * torch.randn(shape)).to(dtype) for _ in range(draws)], activation)


@pytest.mark.parametrize("shape", [(0,), (0, 8), (5, 0), (2, 0, 4)], ids=str)
@ACTIVATIONS
def test_nothing(activation: int, shape: tuple[int, ...]) -> None:
    assert_right([torch.zeros(shape)], activation)


@ACTIVATIONS
def test_strides(activation: int) -> None:
    wide = torch.randn(7, 30, 40)
    for x in (wide[:, 1, 10:], wide.mT[..., ::3], wide[..., ::2], wide[:1].expand(4, -1, -1)):
        strided, whole = (y.requires_grad_() for y in (x.detach(), x.contiguous().clone()))
        out, expected = (FUNCTIONS[activation](y) for y in (strided, whole))
        assert torch.equal(out, expected)
        (grad,), (expected_grad,) = (
            torch.autograd.grad(y.square().sum(), leaf)
            for y, leaf in ((out, strided), (expected, whole))
        )
        assert torch.equal(grad, expected_grad)
    leaf = torch.randn(6, 8, requires_grad=True)
    FUNCTIONS[activation](leaf).sum().backward()  # whose gradient is expanded
    expected = both(leaf, torch.ones(6, 4), FUNCTIONS[activation])[1]
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, expected)


@pytest.mark.usefixtures("vector_unit")
@ACTIVATIONS
def test_tails_are_right_to_a_few_units_in_the_last_place(activation: int) -> None:
    """Subnormal results within two of the smallest numbers."""
    a = torch.cat([torch.linspace(-15, 15, 30_001), -torch.logspace(-30, 2.2, 10_001)])
    exact, relative = tail_of(a.double(), activation)
    found = FUNCTIONS[activation](torch.stack([a, torch.ones_like(a)], 1))[:, 0]
    smallest = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
    allowed = relative * exact.abs() + 3 * smallest
    assert ((found - exact).abs() <= allowed).all()
    if activation == GELU:
        assert (found[a == -13] < -1e-38).all()


@pytest.mark.usefixtures("vector_unit")
@DTYPES
@ACTIVATIONS
def test_gradients_in_the_tails(activation: int, dtype: torch.dtype) -> None:
    a = torch.linspace(-20, 20, 4_001).to(dtype)
    x = torch.stack([a, torch.full_like(a, -2)], 1)
    assert_right([x], activation)


@pytest.mark.usefixtures("vector_unit")
@ACTIVATIONS
def test_zeros_infinities_nan_and_large_numbers(activation: int) -> None:
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([0.0, -0.0, inf, -inf, nan, 1e4, -1e4, 1e30, -1e30, 1e-40, -1e-40, 3.4e38])
    b = torch.tensor([1.0, -2.0, 0.5, inf, nan, 1e4, 1e-40, 0.0])
    x = torch.stack(torch.meshgrid(a, b, indexing="ij"), -1)
    leaf = x.clone().requires_grad_()
    out = FUNCTIONS[activation](leaf)
    expected = gated_activation_reference(x.double(), activation).float()
    torch.testing.assert_close(out.detach(), expected, rtol=1e-6, atol=1e-45, equal_nan=True)
    zeros = expected == 0
    assert torch.equal(out.signbit()[zeros], expected.signbit()[zeros])
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    derivative = grad[:, 0, :1].squeeze(1)  # where b is 1
    half, below = 0.5, torch.zeros(())
    for value, slope in zip(a, derivative, strict=True):
        expected_slope = half if value.abs() < 1 else below if value < 0 else below + 1
        assert slope == expected_slope or (value.isnan() and slope.isnan())


@DTYPES
@pytest.mark.parametrize("width", [1, 7, 64, 1152])
@ACTIVATIONS
def test_dropout_is_that_behind_it(activation: int, width: int, dtype: torch.dtype) -> None:
    x, grad_out = torch.randn(37, 2 * width).to(dtype), torch.randn(37, width).to(dtype)
    given = {"seed": SEED, "rng_offset": 5}
    function = FUNCTIONS[activation]
    fused = both(x, grad_out, lambda y: function(y, dropout_p=0.3, **given))
    apart = both(x, grad_out, lambda y: dropout(function(y), 0.3, **given))
    assert all(map(torch.equal, fused, apart))
    in_float64 = function(x.double(), dropout_p=0.3, **given)
    assert torch.equal(in_float64 != 0, (fused[0] != 0) | ((in_float64 != 0) & (fused[0] == 0)))


def test_dropout_without_a_seed_outside_training_and_at_zero() -> None:
    x = torch.randn(50, 20)
    torch.manual_seed(3)
    first, second = geglu(x, dropout_p=0.5), geglu(x, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(geglu(x, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(geglu(x, dropout_p=0.5, training=False), geglu(x))
    assert torch.equal(swiglu(x, dropout_p=0.0, seed=SEED), swiglu(x))


@ACTIVATIONS
def test_the_reference_is_differentiable(activation: int) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(FUNCTIONS[activation], x)
    torch.autograd.gradgradcheck(FUNCTIONS[activation], x)


def test_only_x_is_kept_for_the_backward_pass() -> None:
    x, kept = torch.randn(5, 8, requires_grad=True), list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y) or y, lambda y: y):
        geglu(x, dropout_p=0.1, seed=SEED)
    assert [one.data_ptr() for one in kept] == [x.data_ptr(), SEED.data_ptr()]


@pytest.mark.parametrize("function", [geglu, swiglu])
@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (torch.ones(3, 7), {}, r"^x: expected \[\.\.\., 2 I\], got \[3, 7\]$"),
        (torch.ones(()), {}, r"^x: expected \[\.\.\., 2 I\], got \[\]$"),
        (torch.ones(3, 7, dtype=torch.float64), {}, r"^x: expected \[\.\.\., 2 I\]"),
        (torch.ones(3, 8, dtype=torch.int64), {}, "^x: expected a floating dtype"),
        (torch.ones(3, 8), {"dropout_p": 1.0}, "probability"),
        (torch.ones(3, 8), {"rng_offset": 2**32}, "rng_offset"),
        (torch.ones(3, 8), {"dropout_p": 0.1, "seed": torch.tensor(1.0)}, "^seed"),
    ],
)
def test_unusable_arguments_are_named(
    function: Callable[..., Tensor], x: Tensor, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        function(x, **options)
    assert "\n" not in str(error.value)


def test_other_approximations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^approximate: expected 'none' or 'tanh', got 'erf'$"):
        geglu(torch.ones(3, 8), approximate="erf")
    with pytest.raises(TypeError, match=r"^x: expected a tensor, got list"):
        geglu([1.0, 2.0])
