"""Layer norm, and BERT's dropout + residual + norm, against float64; gradients by task too."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import (
    Columns,
    FusedLayerNorm,
    TaskRows,
    TaskSegments,
    dropout_add_layer_norm,
    layer_norm,
    layer_norm_fn,
)
from kernels.dropout.dropout import dropout_factors, new_seed

from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(99)
# A prime, just off a vector, the BERTs' widths, the largest.
WIDTHS = [13, 33, 384, 768, 1024, 8192]
# Several of the blocks of 64 rows that one thread takes, and a part of one.
ROWS = 150


def inputs(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x and residual in the dtype, parameters in float32, and the gradient of the output."""
    return {
        "x": torch.randn(rows, width).to(dtype),
        "residual": (1 + 2 * torch.randn(rows, width)).to(dtype),
        "weight": 1 + 0.5 * torch.randn(width),
        "bias": torch.randn(width),
        "x_bias": torch.randn(width),
        "grad_out": torch.randn(rows, width).to(dtype),
    }


def gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], names: list[str]
) -> list[Tensor]:
    """The output and the gradients of the named inputs."""
    leaves = [tensors[name].clone().requires_grad_() for name in names]
    out = function(*leaves)
    grads = torch.autograd.grad(out, leaves, tensors["grad_out"].to(out.dtype))
    return [out.detach(), *grads]


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_plain(width: int, dtype: torch.dtype) -> None:
    tensors = inputs(ROWS, width, dtype)
    names = ["residual", "weight", "bias"]  # a mean that is not zero

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, (width,), weight.to(x.dtype), bias.to(x.dtype), 1e-12)

    found = gradients(layer_norm, tensors, names)
    expected = gradients(torchs, doubled(tensors), names)
    for result, torch_result, exact in zip(
        found, gradients(torchs, tensors, names), expected, strict=True
    ):
        assert_within_twice(result, torch_result, exact)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("width", [13, 384, 8192])
def test_dropout_add(width: int, p: float, dtype: torch.dtype) -> None:
    tensors = inputs(ROWS, width, dtype)
    names = ["x", "residual", "weight", "bias", "x_bias"]
    factors = dropout_factors(ROWS * width, p, SEED, 4).view(ROWS, width)

    def kernel(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        return dropout_add_layer_norm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=p, seed=SEED, rng_offset=4
        )

    def torchs(x: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        weight, bias, x_bias = (parameter.to(x.dtype) for parameter in parameters)
        hidden = residual + (x + x_bias) * factors.to(x.dtype)
        return F.layer_norm(hidden, (width,), weight, bias, 1e-12)

    expected = gradients(torchs, doubled(tensors), names)
    for result, torch_result, exact in zip(
        gradients(kernel, tensors, names), gradients(torchs, tensors, names), expected, strict=True
    ):
        assert_within_twice(result, torch_result, exact)


def task_rows(num_tasks: int, width: int, dtype: torch.dtype = torch.float32) -> TaskRows:
    """Views into a longer buffer, poisoned."""
    buffer = torch.full((num_tasks, 2 * width + 3), torch.nan, dtype=dtype)
    return TaskRows(buffer, Columns(1, (width,)), Columns(width + 2, (width,)))


# Tasks of unlike size, an empty one among them, and rows behind that belong to nobody.
OFFSETS = (0, 70, 70, 71, 140)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_task_rows_hold_each_tasks_own_gradient(dtype: torch.dtype, p: float) -> None:
    tensors = inputs(ROWS, 40, dtype)
    if dtype == torch.float64:
        tensors = doubled(tensors)
    weight, bias = tensors["weight"].requires_grad_(), tensors["bias"].requires_grad_()
    x = tensors["x"].requires_grad_()

    def function(rows: TaskRows | None = None, segments: TaskSegments | None = None) -> Tensor:
        return dropout_add_layer_norm(
            *(x, tensors["residual"], weight, bias),
            dropout_p=p,
            seed=SEED,
            rows=rows,
            segments=segments,
        )

    rows = task_rows(4, 40, weight.dtype)
    out = function(rows, TaskSegments(OFFSETS))
    grads = torch.autograd.grad(out, (x, weight, bias), tensors["grad_out"], allow_unused=True)
    assert grads[1] is None
    assert grads[2] is None
    expected_x = torch.autograd.grad(function(), x, tensors["grad_out"])[0]
    assert torch.equal(grads[0], expected_x)
    for task, (begin, end) in enumerate(pairwise(OFFSETS)):
        own = torch.zeros_like(tensors["grad_out"])
        own[begin:end] = tensors["grad_out"][begin:end]
        expected = torch.autograd.grad(function(), (weight, bias), own)
        # The same sums in another order.
        tolerance = 150 * torch.finfo(weight.dtype).eps
        torch.testing.assert_close(rows.weight[task], expected[0], rtol=tolerance, atol=tolerance)
        assert rows.bias is not None
        torch.testing.assert_close(rows.bias[task], expected[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_accumulate_adds_to_the_rows(dtype: torch.dtype) -> None:
    x = torch.randn(10, 8, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(8, dtype=dtype), torch.randn(8, dtype=dtype)
    once, twice = task_rows(2, 8, dtype), task_rows(2, 8, dtype)
    for rows, accumulate in ((once, False), (twice, False), (twice, True)):
        segments = TaskSegments((0, 4, 10), accumulate)
        layer_norm(x, weight, bias, rows=rows, segments=segments).sum().backward()
    assert torch.equal(2 * once.weight, twice.weight)
    assert torch.equal(2 * once.bias, twice.bias)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
def test_task_rows_without_a_bias(dtype: torch.dtype, residual: bool, prenorm: bool) -> None:
    x, other, grad = (torch.randn(10, 8).to(dtype) for _ in range(3))
    weight, zeros = torch.randn(8).to(dtype).requires_grad_(), torch.zeros(8, dtype=dtype)
    found = []
    for bias in (None, zeros):
        for accumulate in (False, True):
            rows = task_rows(2, 8, dtype)._replace(bias_columns=None)
            rows.weight.fill_(1)
            options = {"rows": rows, "segments": TaskSegments((0, 4, 10), accumulate)}
            leaf = x.clone().requires_grad_()
            out = dropout_add_layer_norm(
                leaf, other if residual else None, weight, bias, prenorm=prenorm, **options
            )
            (out[0] if prenorm else out).backward(grad)
            found.append([leaf.grad, rows.weight])
            if not (residual or prenorm):
                leaf = x.clone().requires_grad_()
                layer_norm(leaf, weight, bias, **options).backward(grad)
                assert torch.equal(leaf.grad, found[-1][0])
            assert rows.buffer[:, 9:].isnan().all()
    for left, right in zip(found[:2], found[2:], strict=True):
        assert all(map(torch.equal, left, right))
    assert found[0][1].isfinite().all()
    assert not torch.equal(found[0][1], found[1][1])


def biased_rows(num_tasks: int, width: int, dtype: torch.dtype) -> TaskRows:
    """Views for weight, bias and x_bias into a longer buffer, poisoned."""
    buffer = torch.full((num_tasks, 3 * width + 5), torch.nan, dtype=dtype)
    return TaskRows(buffer, *(Columns(n * (width + 1), (width,)) for n in (1, 0, 2)))


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("prenorm", [False, True])
def test_task_rows_of_the_bias_of_x(dtype: torch.dtype, p: float, prenorm: bool) -> None:
    """Those of an ordinary gradient for each task; overwritten, then added to."""
    tensors = {name: x.to(dtype) for name, x in inputs(ROWS, 40, dtype).items()}
    leaves = [tensors[n].requires_grad_() for n in ("x", "weight", "bias", "x_bias")]
    x, weight, bias, x_bias = leaves

    def function(rows: TaskRows | None = None, segments: TaskSegments | None = None) -> Tensor:
        out = dropout_add_layer_norm(
            *(x, tensors["residual"], weight, bias, p),
            **{"x_bias": x_bias, "seed": SEED, "rows": rows, "segments": segments},
            prenorm=prenorm,
        )
        return out[0] if prenorm else out

    rows = biased_rows(4, 40, dtype)
    for accumulate in (False, True):
        out = function(rows, TaskSegments(OFFSETS, accumulate))
        grads = torch.autograd.grad(out, leaves, tensors["grad_out"], allow_unused=True)
        assert grads[1:] == (None, None, None)
        for task, (begin, end) in enumerate(pairwise(OFFSETS)):
            own = torch.zeros_like(tensors["grad_out"])
            own[begin:end] = tensors["grad_out"][begin:end]
            expected = torch.autograd.grad(function(), leaves[1:], own)
            tolerance = 150 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
            tolerance = max(tolerance, 4 * torch.finfo(dtype).eps)
            for name, exact in zip(("weight", "bias", "x_bias"), expected, strict=True):
                found = getattr(rows, name)[task] / (2 if accumulate else 1)
                torch.testing.assert_close(found, exact, rtol=tolerance, atol=4 * tolerance)
    assert rows.buffer[:, 40::41].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("frozen", ["x_bias", "weight", "bias", "all but x_bias"])
def test_rows_without_columns_for_a_frozen_parameter(
    frozen: str, prenorm: bool, dtype: torch.dtype
) -> None:
    x, residual = torch.randn(2, 10, 8, dtype=dtype)
    weight, bias, x_bias = torch.randn(3, 8, dtype=dtype)
    names = ("weight", "bias") if frozen == "all but x_bias" else (frozen,)
    whole = biased_rows(2, 8, dtype)
    part = biased_rows(2, 8, dtype)._replace(**{f"{name}_columns": None for name in names})
    for rows in (whole, part):
        own = {"weight": weight.clone(), "bias": bias.clone(), "x_bias": x_bias.clone()}
        for name, parameter in own.items():
            parameter.requires_grad_(rows is whole or name not in names)
        options = {"rows": rows, "segments": TaskSegments((0, 4, 10)), "prenorm": prenorm}
        out = dropout_add_layer_norm(
            x, residual, own["weight"], own["bias"], x_bias=own["x_bias"], **options
        )
        (out[0] if prenorm else out).square().sum().backward()
    for name in ("weight", "bias", "x_bias"):
        if name in names:
            start = getattr(whole, f"{name}_columns").start
            assert part.buffer[:, start : start + 8].isnan().all()
        else:
            assert torch.equal(getattr(part, name), getattr(whole, name))


def test_the_bias_of_x_may_have_another_dtype() -> None:
    x, residual = torch.randn(2, 10, 8).bfloat16()
    grads = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x_bias = torch.linspace(-1, 1, 8).bfloat16().to(dtype).requires_grad_()
        dropout_add_layer_norm(x, residual, None, None, x_bias=x_bias).square().sum().backward()
        assert x_bias.grad.dtype == dtype
        grads.append(x_bias.grad)
    assert torch.equal(grads[0].double(), grads[1])
    assert torch.equal(grads[0].bfloat16(), grads[2])


def test_rows_of_bfloat16_are_rounded_once() -> None:
    x = torch.randn(300, 24, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(2, 24).bfloat16().unbind(0)
    wide, narrow = task_rows(1, 24), task_rows(1, 24, torch.bfloat16)
    for rows, parameters in ((wide, (weight.float(), bias.float())), (narrow, (weight, bias))):
        layer_norm(x, *parameters, rows=rows, segments=TaskSegments((0, 300))).sum().backward()
    assert torch.equal(wide.weight.bfloat16(), narrow.weight)
    assert torch.equal(wide.bias.bfloat16(), narrow.bias)


def test_statistics_survive_a_large_mean() -> None:
    """Mean 10,000 and deviation 1, where E[x^2] - E[x]^2 has no correct digit in float32."""
    x = 1e4 + torch.randn(20, 768)
    exact = F.layer_norm(x.double(), (768,), eps=1e-12)
    assert_within_twice(layer_norm(x), F.layer_norm(x, (768,), eps=1e-12), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_row_gives_zeros_and_finite_gradients(dtype: torch.dtype) -> None:
    """BERT's eps of 1e-12 is zero in float16, and 1 / sqrt(1e-12) is too large for it."""
    x = torch.full((3, 64), 2.0, dtype=dtype, requires_grad=True)
    weight, bias = nn.Parameter(torch.ones(64)), nn.Parameter(torch.zeros(64))
    out = layer_norm(x, weight, bias, 1e-12)
    assert out.count_nonzero() == 0
    out.sum().backward()
    for tensor in (x.grad, weight.grad, bias.grad):
        assert tensor is not None
        assert tensor.isfinite().all()


def test_one_column_gives_the_bias() -> None:
    assert torch.equal(
        layer_norm(torch.randn(5, 1), torch.ones(1), torch.ones(1)), torch.ones(5, 1)
    )


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 20)
    x[1, 3] = torch.nan
    out = layer_norm(x)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


def test_zero_rows() -> None:
    x = torch.empty(0, 16, requires_grad=True)
    weight, bias = nn.Parameter(torch.ones(16)), nn.Parameter(torch.zeros(16))
    out = dropout_add_layer_norm(x, x, weight, bias, dropout_p=0.1)
    assert out.shape == (0, 16)
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


def test_repeats_to_the_bit_whatever_the_threads() -> None:
    tensors = inputs(500, 384, torch.float32)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        options = {"dropout_p": 0.1, "seed": SEED}
        return dropout_add_layer_norm(x, tensors["residual"], weight, tensors["bias"], **options)

    first = gradients(function, tensors, ["x", "weight"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    second = gradients(function, tensors, ["x", "weight"])
    torch.set_num_threads(threads)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_any_strides_and_dimensions() -> None:
    x = torch.randn(5, 12, 7).transpose(1, 2)
    weight, bias = torch.randn(2, 12)
    out = layer_norm(x, weight, bias)
    torch.testing.assert_close(out, layer_norm(x.contiguous(), weight, bias), rtol=0, atol=0)
    assert layer_norm(x[0, 0]).shape == (12,)


def test_a_residual_of_a_wider_dtype_decides_the_results() -> None:
    x, residual = torch.randn(6, 16).bfloat16(), torch.randn(6, 16)
    out = dropout_add_layer_norm(x, residual, None, None)
    assert out.dtype == torch.float32
    assert torch.equal(out, dropout_add_layer_norm(x.float(), residual, None, None))


def test_module_has_the_parameters_of_torchs() -> None:
    ours, torchs = FusedLayerNorm(24), nn.LayerNorm(24)
    assert ours.eps == torchs.eps
    assert isinstance(ours, nn.LayerNorm)  # what exempts norms from weight decay looks for it
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(3, 24)
    torch.testing.assert_close(ours(x), torchs(x))
    plain = FusedLayerNorm([24], eps=1e-12, elementwise_affine=False)
    assert plain.weight is None
    torch.testing.assert_close(plain(x), F.layer_norm(x, (24,), eps=1e-12))
    with pytest.raises(ValueError, match="one dimension"):
        FusedLayerNorm((4, 24))
    with pytest.raises(ValueError, match=r"input: expected \[..., 24\]"):
        ours(torch.randn(3, 25))


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_layer_norm_fn_is_flash_attns_post_norm(out_dtype: torch.dtype | None) -> None:
    x, residual = torch.randn(6, 16).bfloat16(), torch.randn(6, 16)
    weight, bias = torch.randn(2, 16)
    out = layer_norm_fn(x, weight, bias, residual, eps=1e-12, out_dtype=out_dtype)
    expected = dropout_add_layer_norm(x, residual, weight, bias)
    assert torch.equal(out, expected.to(out_dtype or x.dtype))
    alone = layer_norm_fn(x, weight, None)
    assert torch.equal(alone, layer_norm(x, weight, None, 1e-6))
    torch.manual_seed(1)
    dropped = layer_norm_fn(x, weight, bias, dropout_p=0.5)
    torch.manual_seed(1)
    seed = new_seed(x.device)
    zeros = torch.zeros_like(x)
    fused = dropout_add_layer_norm(x, zeros, weight, bias, 0.5, 1e-6, seed=seed)
    torch.testing.assert_close(dropped, fused, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("function", [dropout_add_layer_norm, layer_norm_fn])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_prenorm_returns_the_sum_with_a_gradient_of_its_own(
    dtype: torch.dtype, with_residual: bool, p: float, function: Callable
) -> None:
    tensors = {name: x.to(dtype) for name, x in inputs(ROWS, 40, torch.float32).items()}
    names = ["x", "residual", "weight", "bias"] if with_residual else ["x", "weight", "bias"]
    torch.manual_seed(7)
    factors = dropout_factors(ROWS * 40, p, new_seed(torch.device("cpu")), 0).view(ROWS, 40)

    def run(norm: Callable, dtype: torch.dtype) -> list[Tensor]:
        leaves = [tensors[name].to(dtype).requires_grad_() for name in names]
        residual = leaves[1] if with_residual else None
        torch.manual_seed(7)
        out, total = norm(leaves[0], residual, *leaves[-2:])
        loss = (out * tensors["grad_out"]).sum() + (total * tensors["x_bias"]).sum()
        return [out, total, *torch.autograd.grad(loss, leaves)]

    def ours(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        if function is layer_norm_fn:
            return layer_norm_fn(x, weight, bias, residual, eps=1e-5, dropout_p=p, prenorm=True)
        return dropout_add_layer_norm(x, residual, weight, bias, p, 1e-5, None, None, True)

    def torchs(
        x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = x * factors.to(x.dtype) if residual is None else residual + x * factors.to(x.dtype)
        return F.layer_norm(total, (40,), weight, bias, 1e-5), total

    for found in zip(run(ours, dtype), run(torchs, dtype), run(torchs, torch.float64), strict=True):
        assert_within_twice(*found)


@pytest.mark.parametrize("function", [dropout_add_layer_norm, layer_norm_fn])
def test_the_sum_that_prenorm_returns_has_flash_attns_dtype(function: Callable) -> None:
    x = torch.randn(6, 16).bfloat16()
    weight, bias = torch.randn(2, 16)

    def dtypes(residual: Tensor | None, **options: bool) -> list[torch.dtype]:
        if function is layer_norm_fn:
            results = layer_norm_fn(x, weight, bias, residual, prenorm=True, **options)
        else:
            results = dropout_add_layer_norm(x, residual, weight, bias, prenorm=True, **options)
        return [result.dtype for result in results]

    assert dtypes(None) == [torch.bfloat16] * 2
    assert dtypes(None, residual_in_fp32=True) == [torch.bfloat16, torch.float32]
    assert dtypes(x, residual_in_fp32=True) == [torch.bfloat16] * 2
    assert dtypes(x.float())[1] == torch.float32
    x = x.double()
    assert dtypes(None, residual_in_fp32=True) == [torch.float64] * 2


def test_dropout_add_without_a_residual_or_with_task_rows_and_prenorm() -> None:
    x, residual, weight, bias = torch.randn(2, 9, 8).unbind(0) + torch.randn(2, 8).unbind(0)
    alone = dropout_add_layer_norm(x, None, weight, bias, 0.0, 1e-5, x_bias=bias)
    torch.testing.assert_close(alone, layer_norm(x + bias, weight, bias, 1e-5))
    leaf = x.requires_grad_()
    by_task = []
    for prenorm in (False, True):
        rows = task_rows(2, 8)
        options = {"rows": rows, "segments": TaskSegments((0, 4, 9))}
        result = dropout_add_layer_norm(
            leaf, residual, weight, bias, 0.3, seed=SEED, prenorm=prenorm, **options
        )
        (result[0] if prenorm else result).square().sum().backward()
        by_task.append(torch.stack([rows.weight, rows.bias]))
    torch.testing.assert_close(*by_task)


@pytest.mark.parametrize(
    "option",
    [
        {"rowscale": torch.ones(4)},
        {"layerscale": torch.ones(8)},
        {"return_dropout_mask": True},
    ],
)
def test_what_dropout_add_layer_norm_does_not_support_says_so(option: dict) -> None:
    with pytest.raises(NotImplementedError, match=f"^{next(iter(option))}: not supported"):
        dropout_add_layer_norm(X, X, None, None, 0.1, 1e-12, **option)


@pytest.mark.parametrize(
    "option",
    [
        {"x1": torch.ones(1)},
        {"weight1": torch.ones(1)},
        {"bias1": torch.ones(1)},
        {"rowscale": torch.ones(1)},
        {"zero_centered_weight": True},
        {"return_dropout_mask": True},
        {"out": torch.ones(1)},
        {"residual_out": torch.ones(1)},
    ],
)
def test_what_layer_norm_fn_does_not_support_says_so(option: dict) -> None:
    with pytest.raises(NotImplementedError, match=f"^{next(iter(option))}:"):
        layer_norm_fn(X, torch.ones(8), None, **option)


X = torch.randn(4, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layer_norm(X.int()), "x: expected floating"),
        (lambda: layer_norm(X[:, :0]), "x: expected floating"),
        (lambda: layer_norm(X, torch.ones(7)), "weight: expected"),
        (lambda: layer_norm(X, torch.ones(8, dtype=torch.int32)), "weight: expected a floating"),
        (lambda: layer_norm(X, torch.ones(8, device="meta")), "weight: expected on cpu"),
        (lambda: layer_norm(X, torch.ones(8), torch.ones(7)), "bias: expected"),
        (lambda: dropout_add_layer_norm(X.int(), X, None, None), "x0: expected floating"),
        (lambda: dropout_add_layer_norm(X, X[:3], None, None), "residual: expected"),
        (lambda: dropout_add_layer_norm(X, X, None, None, x_bias=torch.ones(7)), "x_bias"),
        (lambda: dropout_add_layer_norm(X, X, None, None, dropout_p=1.5), "probability"),
        (
            lambda: layer_norm(X, rows=task_rows(1, 8), segments=TaskSegments((0, 4))),
            "need a weight",
        ),
        (
            lambda: layer_norm(X, torch.ones(8), torch.ones(8), rows=task_rows(1, 8)),
            "segments: needed",
        ),
        (
            lambda: dropout_add_layer_norm(
                *(X, X, torch.ones(8), torch.ones(8)),
                x_bias=torch.ones(8, requires_grad=True),
                rows=task_rows(1, 8),
                segments=TaskSegments((0, 4)),
            ),
            "rows.x_bias_columns: None, but the layer's x_bias is trained",
        ),
        (
            lambda: layer_norm(
                *(X, torch.ones(8), torch.ones(8)),
                rows=biased_rows(1, 8, torch.float32),
                segments=TaskSegments((0, 4)),
            ),
            "rows.x_bias_columns: expected the shape of the layer's x_bias, None",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("offsets", [(0, 3, 2), (-1, 2, 3), (0, 2, 5)])
def test_offsets_that_cannot_be_are_refused(offsets: tuple[int, ...]) -> None:
    segments = TaskSegments(offsets)
    with pytest.raises(ValueError, match=r"segments\.offsets: expected to ascend from 0 to 4"):
        layer_norm(X, torch.ones(8), torch.ones(8), rows=task_rows(2, 8), segments=segments)
