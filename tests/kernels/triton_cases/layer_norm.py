"""Layer norm's Triton kernels."""

from itertools import accumulate, pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.dropout.dropout import dropout_factors
from kernels.layer_norm import layer_norm_triton

from ..tolerance import assert_within_twice


@pytest.mark.parametrize(
    ("width", "p", "dtype"),
    [
        (13, 0.0, torch.float32),
        (13, 0.3, torch.float32),
        (384, 0.3, torch.float32),
        (768, 0.3, torch.float16),
        (8192, 0.3, torch.float32),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_layer_norm(width: int, p: float, dtype: torch.dtype, fused: bool, device: str) -> None:
    p = p if fused else 0.0
    # More rows than a program has; the widest take the interpreter long.  Of the tasks some have
    # no rows, and some rows have no task.
    num_rows, offsets = (150, (3, 70, 70, 71, 140)) if width < 8192 else (30, (0, 14, 14, 15, 28))
    x, residual, grad_out = torch.randn(3, num_rows, width, device=device).to(dtype)
    weight, bias, x_bias = torch.randn(3, width, device=device)
    weight = 1 + 0.2 * weight
    seed = torch.tensor(7, device=device)
    factors = dropout_factors(x.numel(), p, seed, 4).view_as(x)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        x_leaf, w, b, own_bias = (t.to(dtype).requires_grad_() for t in (x, weight, bias, x_bias))
        h = x_leaf + 0 * own_bias
        if fused:
            h = residual.to(dtype) + (x_leaf + own_bias) * factors.to(dtype)
        out = F.layer_norm(h, (width,), w, b, 1e-12)
        (grad_x,) = torch.autograd.grad(out, x_leaf, grad_out.to(dtype), retain_graph=True)
        tasks = []
        for begin, end in pairwise(offsets):
            own = torch.zeros_like(out)
            own[begin:end] = grad_out[begin:end]
            grads = torch.autograd.grad(out, (w, b, own_bias), own, retain_graph=True)
            tasks.append(torch.cat(grads[: 3 if fused else 2]))
        return [out.detach(), grad_x, torch.stack(tasks)]

    options = (residual, x_bias, p, seed, 4) if fused else ()
    out, hidden, mean, rstd = layer_norm_triton.forward(x, weight, bias, 1e-12, *options)
    rows = torch.full((4, (3 if fused else 2) * width), torch.nan, device=device)
    own_rows = [*rows.split(width, 1), rows[:0]][:3]
    arguments = (grad_out, hidden, weight, mean, rstd, *own_rows, offsets)
    _, grad_x = layer_norm_triton.backward(*arguments, False, p, seed, 4)
    exact, torchs = reference(torch.float64), reference(dtype)
    for tensors in zip([out, grad_x, rows], torchs, exact, strict=True):
        assert_within_twice(*tensors)
    assert mean.dtype == rstd.dtype == torch.float32
    once = rows.clone()
    layer_norm_triton.backward(*arguments, True, p, seed, 4)
    torch.testing.assert_close(rows, 2 * once, rtol=1e-6, atol=0)


# One launch of the backward kernel runs eight tasks; the last two counts need two and three.
@pytest.mark.parametrize("num_tasks", [1, 8, 9, 19])
def test_layer_norm_of_many_tasks(num_tasks: int, device: str) -> None:
    lengths = torch.randint(0, 4, (num_tasks,)).tolist()
    lengths[-1] = 150  # more rows than a program has
    offsets = tuple(accumulate(lengths, initial=5))
    num_rows, width = offsets[-1] + 7, 24
    x, grad_out = torch.randn(2, num_rows, width, device=device)
    weight = torch.ones(width, device=device)
    out, hidden, mean, rstd = layer_norm_triton.forward(x, weight, None, 1e-12)
    buffer = torch.full((num_tasks, 3 * width + 5), torch.nan, device=device)
    rows = buffer[:, 5:].split(width, 1)
    arguments = (grad_out, hidden, weight, mean, rstd)
    grad, _ = layer_norm_triton.backward(*arguments, *rows, offsets, False)
    nothing = buffer.new_empty(0)
    plain, _ = layer_norm_triton.backward(*arguments, *(nothing,) * 3, (), False)
    assert torch.equal(grad, plain)
    for own, terms in zip(rows, (grad_out * out, grad_out, grad), strict=True):
        exact = [terms[begin:end].double().sum(0) for begin, end in pairwise(offsets)]
        # Sums of up to 150 terms, each rounded once before.
        torch.testing.assert_close(own.double(), torch.stack(exact), rtol=1e-5, atol=1e-5)
    assert buffer[:, :5].isnan().all()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_layer_norm_with_rows_for_one_parameter(wanted: int, device: str) -> None:
    x, grad_out = torch.randn(2, 40, 24, device=device)
    weight, nothing = torch.ones(24, device=device), x.new_empty(0)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, None, 1e-12)
    arguments = (grad_out, hidden, weight, mean, rstd)
    rows = torch.full((3, 2, 24), torch.nan, device=device)
    layer_norm_triton.backward(*arguments, *rows, (0, 11, 40), False)
    own = torch.full((2, 24), torch.nan, device=device)
    given = [own if place == wanted else nothing for place in range(3)]
    layer_norm_triton.backward(*arguments, *given, (0, 11, 40), False)
    assert torch.equal(own, rows[wanted])


def test_layer_norm_whose_weight_and_bias_are_one_parameter(device: str) -> None:
    x, grad_out = torch.randn(2, 40, 24, device=device)
    weight = torch.ones(24, device=device)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, weight, 1e-12)
    apart, one = torch.zeros(2, 2, 24, device=device), torch.zeros(2, 24, device=device)
    arguments = (grad_out, hidden, weight, mean, rstd)
    nothing, of_tasks = x.new_empty(0), ((0, 11, 40), True)
    layer_norm_triton.backward(*arguments, *apart, nothing, *of_tasks)
    layer_norm_triton.backward(*arguments, one, one, nothing, *of_tasks)
    torch.testing.assert_close(one, apart.sum(0))


def test_layer_norm_without_rows_has_sums_of_zero(device: str) -> None:
    x, weight = torch.randn(0, 24, device=device), torch.ones(24, device=device)
    _, hidden, mean, rstd = layer_norm_triton.forward(x, weight, None, 1e-12)
    rows = torch.full((3, 2, 24), torch.nan, device=device)
    layer_norm_triton.backward(x, hidden, weight, mean, rstd, *rows, (0, 0, 0), False)
    assert rows.count_nonzero() == 0


# Row sums of constants that are rounded, and a few columns.
@pytest.mark.parametrize("width", [1, 3, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("fused", [False, True])
def test_layer_norm_of_nearly_constant_rows(
    fused: bool, dtype: torch.dtype, width: int, device: str
) -> None:
    x, residual = (torch.full((64, width), c, device=device) for c in (0.1, 0.3))
    eps = 1e-12 if dtype == torch.float32 else 1e-5  # 1e-12 is zero in float16, for torch
    if dtype == torch.float16:  # in float32 the sum itself is rounded, as torch's is
        noise = torch.finfo(dtype).eps * torch.randint(-1, 2, (32, width), device=device)
        x[:32] *= 1 + noise
    x, residual = x.to(dtype), residual.to(dtype)
    grad_out = (1e-3 * torch.randn(64, width, device=device)).to(dtype)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype).requires_grad_()
        h = leaf + residual.to(dtype) if fused else leaf
        out = F.layer_norm(h, (width,), eps=eps)
        return [out.detach(), *torch.autograd.grad(out, leaf, grad_out.to(dtype))]

    options = (residual, None, 0.0, None, 0) if fused else ()
    out, *saved = layer_norm_triton.forward(x, None, None, eps, *options)
    hidden, mean, rstd = saved
    nothing = torch.empty(0, device=device)
    arguments = (grad_out, hidden, None, mean, rstd, *(nothing,) * 3, (), False)
    grad_x, _ = layer_norm_triton.backward(*arguments)
    for tensors in zip([out, grad_x], reference(dtype), reference(torch.float64), strict=True):
        assert_within_twice(*tensors)


@pytest.mark.parametrize("width", [1, 13, 384])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_prenorm(has_bias: bool, is_rms_norm: bool, p: float, width: int, device: str) -> None:
    num_rows, offsets, eps = 150, (3, 70, 70, 71, 140), 1e-5
    x, residual, grad_out, grad_sum = torch.randn(4, num_rows, width, device=device)
    # A row of one column near 0 would be the whole error: no sum is.
    x, residual = x / 8, residual + 3 * residual.sign()
    weight, bias, x_bias = torch.randn(3, width, device=device)
    x_bias = x_bias / 8
    bias = bias if has_bias else None
    seed = torch.tensor(7, device=device)
    factors = dropout_factors(x.numel(), p, seed, 4).view_as(x)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaf, w = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        total = residual.to(dtype) + (leaf + x_bias.to(dtype)) * factors.to(dtype)
        if is_rms_norm:
            out = F.rms_norm(total, (width,), w, eps)
        else:
            out = F.layer_norm(total, (width,), w, None, eps)
        results = [out if bias is None else out + bias.to(dtype), total]
        grads = [grad_out.to(dtype), grad_sum.to(dtype)]
        (grad_x,) = torch.autograd.grad(results, leaf, grads, retain_graph=True)
        return [*(result.detach() for result in results), grad_x]

    options = {"prenorm": True, "is_rms_norm": is_rms_norm}
    given = (x, weight, bias, eps, residual, x_bias, p, seed, 4)
    out, hidden, mean, rstd = layer_norm_triton.forward(*given, **options)
    options = {"grad_sum": grad_sum, "is_rms_norm": is_rms_norm}
    rows = torch.full((3, 4, width), torch.nan, device=device)
    nothing = rows[:0, 0]
    own_rows = (rows[0], rows[1] if has_bias else nothing, rows[2] if has_bias else nothing)
    saved = (grad_out, hidden, weight, mean, rstd)
    arguments = (*saved, *own_rows, offsets, False, p, seed, 4)
    grad_hidden, grad_x = layer_norm_triton.backward(*arguments, **options)
    results = [out, hidden, grad_x]
    for tensors in zip(results, reference(torch.float32), reference(torch.float64), strict=True):
        assert_within_twice(*tensors)
    assert mean.count_nonzero() == 0 or not is_rms_norm
    xhat = (hidden - mean[:, None]) * rstd[:, None]
    terms = (grad_out * xhat, grad_out, grad_x)
    for own, term in zip(own_rows, terms, strict=True):
        if own.numel() > 0:
            exact = [term[begin:end].double().sum(0) for begin, end in pairwise(offsets)]
            torch.testing.assert_close(own.double(), torch.stack(exact), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_x, grad_hidden * factors, rtol=1e-6, atol=1e-6)
