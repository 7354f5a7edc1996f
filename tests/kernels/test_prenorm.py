"""RMS norm, and norms that return the sum before them, against float64; gradients by task too."""

import copy
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import (
    Columns,
    FusedRMSNorm,
    TaskGradients,
    TaskRows,
    TaskSegments,
    dropout_add_layer_norm,
    dropout_add_rms_norm,
    layer_norm,
    layer_norm_fn,
    new_task_rows,
    rms_norm,
)
from kernels.dropout.dropout import dropout_factors

from .tolerance import assert_within_twice

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(99)
WIDTHS = [1, 3, 33, 65, 384, 768, 1024]
# Several of the blocks of 64 rows that one thread takes, and a part of one; of the tasks one has no
# rows, and some rows have no task.
ROWS, OFFSETS = 150, (0, 70, 70, 71, 140)
EPS = 1e-5
NAMES = ("x", "residual", "weight", "bias", "x_bias")


class Options(NamedTuple):
    """What a pre-norm is given beside its rows, and which of its results have gradients."""

    p: float = 0.3
    x_bias: bool = True
    weight: bool = True
    bias: bool = True
    of_out: bool = True
    of_sum: bool = True


OPTIONS = [
    Options(),
    Options(p=0.0),
    Options(x_bias=False, bias=False),
    Options(weight=False, bias=False),
    Options(of_sum=False),
    Options(of_out=False),
    Options(p=0.0, x_bias=False, of_out=False),
]


def away_from_zero(*shape: int) -> Tensor:
    """Numbers of magnitudes from 1 on: a row of one column near 0 would be the whole error."""
    x = torch.randn(shape)
    return x + x.sign()


def inputs(rows: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """x, residual and both gradients in the dtype, parameters in float32."""
    return {
        "x": (torch.randn(rows, width) / 8).to(dtype),
        "residual": (3 * away_from_zero(rows, width)).to(dtype),
        "weight": 1 + 0.5 * torch.randn(width),
        "bias": torch.randn(width),
        "x_bias": torch.randn(width) / 8,
        "grad_out": torch.randn(rows, width).to(dtype),
        "grad_sum": torch.randn(rows, width).to(dtype),
    }


def draws(width: int) -> int:
    """Batches whose errors are taken together, so that the largest of few is no matter of luck."""
    return max(1, 100 // width)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, is_rms_norm: bool) -> Tensor:
    """The norm by torch."""
    if not is_rms_norm:
        return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    out = F.rms_norm(x, x.shape[-1:], weight, EPS)
    return out if bias is None else out + bias


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_weight", [False, True])
def test_rms_norm(has_weight: bool, width: int, dtype: torch.dtype) -> None:
    batches = draws(width)
    x = (3 * away_from_zero(batches, ROWS, width)).to(dtype)
    grad = torch.randn(batches, ROWS, width).to(dtype)
    weight = 1 + 0.5 * torch.randn(batches, width) if has_weight else None

    def run(function: Callable[..., Tensor], own: torch.dtype, of_weight: torch.dtype) -> list:
        leaf = x.to(own).requires_grad_()
        weights = [] if weight is None else [weight.to(of_weight).requires_grad_()]
        given = weights[0] if weights else [None] * batches
        out = torch.stack([function(*pair) for pair in zip(leaf, given, strict=True)])
        return [out.detach(), *torch.autograd.grad(out, [leaf, *weights], grad.to(own))]

    def torchs(x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, (width,), None if weight is None else weight.to(x.dtype), EPS)

    def ours(x: Tensor, weight: Tensor | None) -> Tensor:
        return rms_norm(x, weight, EPS)

    exact = run(torchs, torch.float64, torch.float64)
    torch.testing.assert_close(run(ours, torch.float64, torch.float64), exact)
    results = run(ours, dtype, torch.float32), run(torchs, dtype, torch.float32), exact
    for found in zip(*results, strict=True):
        assert_within_twice(*found)


class Prenorm:
    """One batch, and a pre-norm's results and gradients."""

    def __init__(self, width: int, dtype: torch.dtype, is_rms_norm: bool, own: Options) -> None:
        self.tensors, self.dtype = inputs(ROWS, width, dtype), dtype
        self.is_rms_norm, self.own = is_rms_norm, own
        self.factors = dropout_factors(ROWS * width, own.p, SEED, 4).view(ROWS, width)
        absent = {"weight": not own.weight, "bias": not own.bias, "x_bias": not own.x_bias}
        self.names = [name for name in NAMES if not absent.get(name, False)]

    def results(self, function: Callable[..., tuple[Tensor, Tensor]], kind: torch.dtype) -> list:
        """Both results, and the gradients of what is given."""
        leaves = {
            name: self.tensors[name].to(kind if name in NAMES[:2] else self.of_parameters(kind))
            for name in self.names
        }
        leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
        out, total = function(*(leaves.get(name) for name in NAMES))
        pairs = [(out, "grad_out")] * self.own.of_out + [(total, "grad_sum")] * self.own.of_sum
        results, grads = zip(*((x, self.tensors[name].to(kind)) for x, name in pairs), strict=True)
        own = list(leaves.values())
        found = torch.autograd.grad(results, own, grads, allow_unused=True, materialize_grads=True)
        return [out.detach(), total.detach(), *found]

    def of_parameters(self, kind: torch.dtype) -> torch.dtype:
        """float32, also beside rows of fewer bits."""
        return torch.promote_types(kind, torch.float32)

    def ours(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        result = dropout_add_layer_norm(
            *(x, residual, weight, bias, self.own.p, EPS),
            **{"prenorm": True, "is_rms_norm": self.is_rms_norm, "x_bias": x_bias},
            **{"seed": SEED, "rng_offset": 4},
        )
        assert isinstance(result, tuple)
        return result

    def torchs(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        x_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        weight, bias, x_bias = (
            None if t is None else t.to(x.dtype) for t in (weight, bias, x_bias)
        )
        total = x if x_bias is None else x + x_bias
        total = residual + total * self.factors.to(x.dtype)
        return norm(total, weight, bias, self.is_rms_norm), total


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_prenorm(is_rms_norm: bool, width: int, dtype: torch.dtype) -> None:
    pooled: dict[str, list[list[Tensor]]] = defaultdict(list)
    for own in OPTIONS * draws(width):
        case = Prenorm(width, dtype, is_rms_norm, own)
        ours, exact = case.results(case.ours, dtype), case.results(case.torchs, torch.float64)
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact)
            continue
        torchs = case.results(case.torchs, dtype)
        for name, *found in zip(["out", "sum", *case.names], ours, torchs, exact, strict=True):
            pooled[name].append([tensor.flatten() for tensor in found])
    for several in pooled.values():
        assert_within_twice(*map(torch.cat, zip(*several, strict=True)))


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_prenorm_on_each_vector_unit(is_rms_norm: bool, dtype: torch.dtype) -> None:
    test_prenorm(is_rms_norm, 33, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_a_prenorm_is_the_norm_of_the_sum_that_it_returns(
    is_rms_norm: bool, dtype: torch.dtype
) -> None:
    """To the bit, and so is its gradient, but for that of the sum."""
    case = Prenorm(65, dtype, is_rms_norm, Options(p=0.0, of_sum=False))
    x, residual, weight, bias, x_bias = (case.tensors[name] for name in NAMES)
    bias = None if is_rms_norm else bias  # rms_norm has none
    leaf = residual.requires_grad_()
    out, total = case.ours(x, leaf, weight, bias, x_bias)
    (grad,) = torch.autograd.grad(out, leaf, case.tensors["grad_out"])
    hidden = total.detach().requires_grad_()
    if is_rms_norm:
        expected = rms_norm(hidden, weight, EPS)
    else:
        expected = layer_norm(hidden, weight, bias, EPS)
    assert torch.equal(out, expected)
    assert torch.equal(grad, torch.autograd.grad(expected, hidden, case.tensors["grad_out"])[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_task_rows(has_bias: bool, is_rms_norm: bool, p: float, dtype: torch.dtype) -> None:
    """Each task's own gradients, overwritten, then added to."""
    width = 40
    case = Prenorm(width, dtype, is_rms_norm, Options(p=p, bias=has_bias))
    of_parameters = torch.promote_types(dtype, torch.float32)
    leaves = {
        name: case.tensors[name].to(dtype if name in NAMES[:2] else of_parameters).requires_grad_()
        for name in case.names
    }
    trained = [leaves[name] for name in case.names[2:]]
    columns = [Columns(n * (width + 1), (width,)) for n in (1, 0, 2)]
    buffer = torch.full((4, 3 * width + 5), torch.nan, dtype=of_parameters)
    rows = TaskRows(buffer, columns[0], columns[1] if has_bias else None, columns[2])

    def function(**options: object) -> tuple[Tensor, ...]:
        return dropout_add_layer_norm(
            *(leaves["x"], leaves["residual"], leaves["weight"], leaves.get("bias"), p, EPS),
            **{"prenorm": True, "is_rms_norm": is_rms_norm, "x_bias": leaves["x_bias"]},
            **{"seed": SEED, **options},
        )

    grads = [case.tensors["grad_out"], case.tensors["grad_sum"]]
    for accumulate in (False, True):
        found = function(rows=rows, segments=TaskSegments(OFFSETS, accumulate))
        nothing = torch.autograd.grad(found, trained, grads, allow_unused=True)
        assert all(gradient is None for gradient in nothing)
    tolerance = 150 * torch.finfo(of_parameters).eps  # the same sums in another order
    for task, (begin, end) in enumerate(pairwise(OFFSETS)):
        own = [torch.zeros_like(grad) for grad in grads]
        for part, grad in zip(own, grads, strict=True):
            part[begin:end] = grad[begin:end]
        expected = torch.autograd.grad(function(), trained, own)
        for name, exact in zip(case.names[2:], expected, strict=True):
            row = getattr(rows, name)[task] / 2
            torch.testing.assert_close(row, exact, rtol=tolerance, atol=4 * tolerance)
    assert rows.buffer[:, width :: width + 1].isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_task_rows_of_rms_norm(dtype: torch.dtype) -> None:
    x, grad = torch.randn(2, 140, 24).to(dtype)
    weight = torch.randn(24, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_()
    rows = new_task_rows(4, weight, fill=torch.nan)
    for accumulate in (False, True):
        segments = TaskSegments(OFFSETS, accumulate)
        rms_norm(x, weight, rows=rows, segments=segments).backward(grad)
    assert weight.grad is None
    for task, (begin, end) in enumerate(pairwise(OFFSETS)):
        out = rms_norm(x[begin:end], weight)
        (expected,) = torch.autograd.grad(out, weight, grad[begin:end])
        torch.testing.assert_close(rows.weight[task], 2 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 64, 1000])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_rows_that_are_nearly_constant(is_rms_norm: bool, width: int, dtype: torch.dtype) -> None:
    for constant in (0.1, 500.0):
        case = Prenorm(width, dtype, is_rms_norm, Options(p=0.0, x_bias=False))
        for name, share in (("x", 0.25), ("residual", 0.75)):
            noise = torch.finfo(dtype).eps * torch.randint(-1, 2, (ROWS, width))
            row = torch.tensor(share * constant).to(dtype).double()
            case.tensors[name] = (row * (1 + noise)).to(dtype)
        exact = case.results(case.torchs, torch.float64)
        torchs = case.results(case.torchs, dtype)
        # The sum's rounding is the largest error of its norm, whoever rounds it: against the norm
        # of the rounded sum, as is measured for both, there are the norm's own errors alone.
        assert_within_twice(case.results(case.ours, dtype)[1], torchs[1], exact[1])
        leaf = torchs[1].requires_grad_()
        for own in (dtype, torch.float64):
            hidden = leaf.detach().to(own).requires_grad_()
            out = norm(hidden, None, None, is_rms_norm)
            grads = torch.autograd.grad(out, hidden, case.tensors["grad_out"].to(own))
            torchs, exact = exact, [out.detach(), *grads]
        zeros = torch.zeros_like(leaf)
        hidden = leaf.detach().requires_grad_()
        out, _ = case.ours(zeros, hidden, None, None, None)
        ours = [out.detach(), *torch.autograd.grad(out, hidden, case.tensors["grad_out"])]
        for found in zip(ours, torchs, exact, strict=True):
            assert_within_twice(*found)


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e15])
@pytest.mark.parametrize("is_rms_norm", [False, True])
def test_small_and_huge_values(is_rms_norm: bool, scale: float) -> None:
    case = Prenorm(65, torch.float32, is_rms_norm, Options(x_bias=False))
    for name in ("x", "residual"):
        case.tensors[name] *= scale
    results = [case.results(case.ours, torch.float32)]
    results += [case.results(case.torchs, own) for own in (torch.float32, torch.float64)]
    for found in zip(*results, strict=True):
        assert_within_twice(*found)


def test_a_nan_stays_in_its_row() -> None:
    x = torch.randn(4, 20)
    x[1, 3] = torch.nan
    out, total = dropout_add_rms_norm(x, torch.ones(4, 20), None, None, prenorm=True)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()
    assert total.isnan().sum() == 1


def test_rows_of_zeros_give_zeros() -> None:
    x = torch.zeros(3, 8, requires_grad=True)
    rms_norm(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3, 8), 1e3))


def test_no_rows() -> None:
    x, weight = torch.empty(0, 16, requires_grad=True), torch.ones(16, requires_grad=True)
    out, total = dropout_add_rms_norm(x, x, weight, None, 0.1, prenorm=True)
    assert out.shape == total.shape == (0, 16)
    (out.sum() + total.sum()).backward()
    assert weight.grad.count_nonzero() == 0


def test_rows_that_are_not_contiguous() -> None:
    x, residual, grad_out, grad_sum = torch.randn(4, 24, 10)
    weight = torch.randn(24)
    found = []
    for in_order in (False, True):
        given = [
            t.t().contiguous() if in_order else t.t() for t in (x, residual, grad_out, grad_sum)
        ]
        leaves = [t.requires_grad_() for t in given[:2]]
        results = dropout_add_rms_norm(*leaves, weight, None, 0.2, prenorm=True, seed=SEED)
        found.append([*results, *torch.autograd.grad(results, leaves, given[2:])])
        assert results[0].is_contiguous()
    assert all(map(torch.equal, *found))


def test_flash_attns_functions_are_the_same() -> None:
    x, residual, weight, bias = *torch.randn(2, 6, 16), *torch.randn(2, 16)
    options = {"prenorm": True}
    expected = dropout_add_layer_norm(
        x, residual, weight, bias, 0.0, 1e-6, is_rms_norm=True, **options
    )
    by_name = dropout_add_rms_norm(x, residual, weight, bias, 0.0, 1e-6, **options)
    by_flag = layer_norm_fn(x, weight, bias, residual, is_rms_norm=True, **options)
    assert all(map(torch.equal, expected, by_name))
    assert all(map(torch.equal, expected, by_flag))
    alone = dropout_add_rms_norm(x, None, weight, None, 0.0, 1e-6)
    assert torch.equal(alone, rms_norm(x, weight))


@pytest.mark.parametrize("shape", [16, (16,), [4, 16]])
def test_apexs_module(shape: int | tuple | list) -> None:
    module, x = FusedRMSNorm(shape), torch.randn(3, 4, 16)
    torch.nn.init.normal_(module.weight)
    own = [shape] if isinstance(shape, int) else list(shape)
    expected = F.rms_norm(x, own, module.weight, 1e-5)
    torch.testing.assert_close(module(x), expected)
    plain = FusedRMSNorm(shape, elementwise_affine=False)
    assert plain.weight is None
    torch.testing.assert_close(plain(x), F.rms_norm(x, own, None, 1e-5))
    with pytest.raises(ValueError, match=r"^input: expected \[\.\.\., "):
        module(x[..., :-1])


class Layers(nn.Module):
    """A pre-norm without a bias, an RMS norm, and the sum of both results."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.rms_norm = nn.LayerNorm(16, bias=False), nn.RMSNorm(16)
        self.fused = FusedRMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        normed, total = dropout_add_layer_norm(
            *(F.linear(x, self.dense.weight), x, self.norm.weight, self.norm.bias),
            **{"prenorm": True, "x_bias": self.dense.bias},
        )
        return self.fused(self.last(self.rms_norm(normed))) + total


def test_task_gradients_of_modules() -> None:
    model, x = Layers(), torch.randn(10, 16)
    plain = copy.deepcopy(model)
    collected = TaskGradients(model, 2)
    with collected.batch([4, 6]):
        out = model(x)
    out.square().sum().backward()
    found = {name: tensor.clone() for name, tensor in collected.named_views()}
    for task, rows in enumerate((x[:4], x[4:])):
        alone = plain(rows).square().sum()
        expected = torch.autograd.grad(alone, list(plain.parameters()))
        for (name, _), gradient in zip(plain.named_parameters(), expected, strict=True):
            torch.testing.assert_close(found[name][task], gradient, rtol=1e-4, atol=1e-4)
