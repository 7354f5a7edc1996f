"""The feed-forward part of a layer: two products with GELU between them, against float64.

In bfloat16 on a processor with AVX512_BF16, GELU and its derivative are computed within the
products (csrc/linear_simd.h); elsewhere torch computes them between two linear layers.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels
from kernels import Columns, TaskRows, TaskSegments, new_task_rows
from kernels.linear import linear as linear_module
from kernels.linear.linear import MULTIPLIES_BF16, is_ours

from .argument_fuzz import changed, freed, saved_by, strided
from .tolerance import assert_within_twice

OPS = torch.ops.superbert
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
needs_bf16 = pytest.mark.skipif(not MULTIPLIES_BF16, reason="this processor has no AVX512_BF16")

# Rows, where tasks begin and end, and widths H, I and O.
CASES = {
    "no row": ((0, (0, 0)), (4, 6, 5)),
    "one row, width and column": ((1, (0, 1)), (1, 1, 1)),
    "one row behind the last task": ((1, (0, 0)), (5, 3, 2)),
    "odd widths, a task without tokens": ((20, (0, 7, 7, 18)), (7, 13, 5)),
    "empty tasks at both ends": ((31, (0, 0, 13, 31, 31)), (17, 33, 15)),
    "past a block of rows and a panel": ((131, (0, 5, 129)), (47, 97, 49)),
    "past a block of a task's tokens": ((1030, (0, 1, 1027)), (16, 31, 3)),
    "past a chunk of every inner dimension": ((33, (0, 1, 33)), (385, 417, 49)),
    "BERT": ((37, (0, 12, 37)), (384, 1536, 384)),
}
PARTS = ("up_weight", "up_bias", "down_weight")


class Case:
    """Operands, and the gradient of the output."""

    def __init__(
        self, name: str, dtype: torch.dtype = torch.bfloat16, *, biased: bool = True
    ) -> None:
        (rows, self.offsets), (width, inner, outputs) = CASES[name]
        self.x = torch.randn(rows, width).to(dtype)
        # So that GELU sees numbers of which none, half or all is left.
        self.up_weight = (2 * torch.randn(inner, width) / width**0.5).to(dtype)
        self.up_bias = torch.randn(inner).to(dtype) if biased else None
        self.down_weight = (torch.randn(outputs, inner) / inner**0.5).to(dtype)
        self.grad = torch.randn(rows, outputs).to(dtype)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        return self.x, self.up_weight, self.up_bias, self.down_weight

    def to(self, dtype: torch.dtype) -> "Case":
        other = object.__new__(Case)
        parts = vars(self).items()
        other.__dict__ = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in parts}
        return other

    def by_autograd(self) -> dict[str, Tensor]:
        """The output and all gradients, of a plain graph for each task."""
        leaves = [None if x is None else x.detach().requires_grad_() for x in self.tensors]
        x, up_weight, up_bias, down_weight = leaves
        out = F.linear(F.gelu(F.linear(x, up_weight, up_bias)), down_weight)
        found: dict[str, Any] = {name: [] for name in PARTS}
        for a, b in pairwise(self.offsets):
            grads = torch.autograd.grad(
                out[a:b],
                [leaf for leaf in leaves[1:] if leaf is not None],
                self.grad[a:b],
                retain_graph=True,
            )
            names = [name for name, leaf in zip(PARTS, leaves[1:], strict=True) if leaf is not None]
            for name, grad in zip(names, grads, strict=True):
                found[name].append(grad)
        rows = {name: torch.stack(grads) for name, grads in found.items() if grads}
        (of_x,) = torch.autograd.grad(out, x, self.grad)
        return {"out": out.detach(), "x": of_x, **rows}

    def rows(self, *, fill: float = torch.nan, dtype: torch.dtype | None = None) -> list[TaskRows]:
        tasks = len(self.offsets) - 1
        up = new_task_rows(tasks, self.up_weight.to(dtype), self.up_bias, fill=fill)
        return [up, new_task_rows(tasks, self.down_weight.to(dtype), fill=fill)]

    def run(
        self,
        rows: list[TaskRows] | None = None,
        *,
        frozen: tuple[str, ...] = (),
        accumulate: bool = False,
    ) -> dict[str, Tensor]:
        """The output and all gradients, those of weights in rows unless they are frozen."""
        up, down = rows or self.rows()
        leaves: dict[str, Any] = {"x": self.x, **dict(zip(PARTS, self.tensors[1:], strict=True))}
        leaves = {
            name: None if x is None else x.detach().requires_grad_(name not in frozen)
            for name, x in leaves.items()
        }
        if "up_weight" in frozen:
            up = up._replace(weight_columns=None)
        if "up_bias" in frozen:
            up = up._replace(bias_columns=None)
        if "down_weight" in frozen:
            down = down._replace(weight_columns=None)
        segments = TaskSegments(self.offsets, accumulate)
        out = kernels.feed_forward(**leaves, up_rows=up, down_rows=down, segments=segments)
        out.backward(self.grad)
        assert all(leaves[name] is None or leaves[name].grad is None for name in PARTS)
        found = {"out": out.detach(), "x": leaves["x"].grad}
        found |= {"up_weight": up.weight, "up_bias": up.bias, "down_weight": down.weight}
        return {name: x for name, x in found.items() if x is not None}


def assert_all_within_twice(
    found: dict[str, Tensor], torchs: dict[str, Tensor], exact: dict[str, Tensor]
) -> None:
    for name, own in found.items():
        assert_within_twice(own, torchs[name], exact[name])


# ---- output and gradients ------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory", "bf16_unit")
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_output_and_task_gradients(name: str, dtype: torch.dtype, biased: bool) -> None:
    case = Case(name, dtype, biased=biased)
    torchs, exact = case.by_autograd(), case.to(torch.float64).by_autograd()
    found = case.run()
    assert found.keys() == exact.keys()
    assert_all_within_twice(found, torchs, exact)


@pytest.mark.usefixtures("poisoned_memory", "bf16_unit")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_without_rows(name: str, dtype: torch.dtype) -> None:
    case = Case(name, dtype)
    torchs, exact = case.by_autograd()["out"], case.to(torch.float64).by_autograd()["out"]
    leaves = [x.detach().requires_grad_() for x in case.tensors]
    out = kernels.feed_forward(*leaves)
    assert_within_twice(out, torchs, exact)
    with torch.no_grad():
        assert_within_twice(kernels.feed_forward(*case.tensors), torchs, exact)
    with torch.inference_mode():
        assert_within_twice(kernels.feed_forward(*case.tensors), torchs, exact)
    plain = F.linear(F.gelu(F.linear(*leaves[:3])), leaves[3])
    for own, expected in zip(
        torch.autograd.grad(out, leaves, case.grad),
        torch.autograd.grad(plain, leaves, case.grad),
        strict=True,
    ):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_stream_of_several_dimensions(dtype: torch.dtype) -> None:
    case = Case("odd widths, a task without tokens", dtype)
    x = case.x.view(2, 10, -1)
    with torch.no_grad():
        found = kernels.feed_forward(x, *case.tensors[1:])
        expected = kernels.feed_forward(*case.tensors)
    torch.testing.assert_close(found.flatten(0, 1), expected)


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
@pytest.mark.parametrize("name", CASES)
def test_accumulates(name: str) -> None:
    case = Case(name)
    torchs, exact = case.by_autograd(), case.to(torch.float64).by_autograd()
    rows = case.rows()
    for own in rows:
        own.buffer.copy_(torch.randn(own.buffer.shape))
    held = {"up_weight": rows[0].weight, "up_bias": rows[0].bias, "down_weight": rows[1].weight}
    for part, before in held.items():
        torchs[part] = torchs[part] + before
        exact[part] = exact[part] + before.double()
    assert_all_within_twice(case.run(rows, accumulate=True), torchs, exact)


@pytest.mark.parametrize("accumulate", [False, True])
def test_float32_is_two_layers_and_torchs_gelu(accumulate: bool) -> None:
    """To the bit."""
    case = Case("odd widths, a task without tokens", torch.float32)
    found = case.run(case.rows(fill=1.0), accumulate=accumulate)
    (up, down), segments = case.rows(fill=1.0), TaskSegments(case.offsets, accumulate)
    x, up_weight, up_bias, down_weight = (t.detach().requires_grad_() for t in case.tensors)
    widened = kernels.linear(x, up_weight, up_bias, rows=up, segments=segments)
    out = kernels.linear(F.gelu(widened), down_weight, rows=down, segments=segments)
    out.backward(case.grad)
    parts = {"up_weight": up.weight, "up_bias": up.bias, "down_weight": down.weight}
    for name, expected in {"out": out, "x": x.grad, **parts}.items():
        assert torch.equal(found[name], expected), name


def test_gradients_of_bfloat16_in_rows_of_float32() -> None:
    case = Case("odd widths, a task without tokens")
    rows = [own._replace(buffer=own.buffer.float()) for own in case.rows()]
    found, expected = case.run(rows), case.run()
    for name in PARTS:
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].bfloat16(), expected[name]), name


FROZEN = [
    *((name,) for name in PARTS),
    *(("up_weight", "up_bias"), ("up_bias", "down_weight"), PARTS, ("x",), ("x", *PARTS[1:])),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("frozen", FROZEN, ids="-".join)
def test_frozen_parts_have_no_gradient(frozen: tuple[str, ...], dtype: torch.dtype) -> None:
    """Their columns stay as they are; all others are the same to the bit."""
    case = Case("odd widths, a task without tokens", dtype)
    whole, rows = case.run(), case.rows()
    part = case.run(rows, frozen=frozen)
    names = {"up_weight": rows[0].weight, "up_bias": rows[0].bias, "down_weight": rows[1].weight}
    for name, held in names.items():
        assert held.isnan().all() if name in frozen else torch.equal(held, whole[name]), name
    assert torch.equal(part["out"], whole["out"])
    assert ("x" in part) is ("x" not in frozen)
    if "x" in part:
        assert torch.equal(part["x"], whole["x"])


@needs_bf16
@pytest.mark.parametrize("without", ["up_rows", "down_rows"])
def test_rows_of_one_layer_alone(without: str) -> None:
    """Of two linear layers: the other layer's gradients are autograd's."""
    case = Case("odd widths, a task without tokens")
    up, down = case.rows()
    given = {"up_rows": up, "down_rows": down, "segments": TaskSegments(case.offsets)}
    leaves = [tensor.detach().requires_grad_() for tensor in case.tensors]
    out = kernels.feed_forward(*leaves, **(given | {without: None}))
    out.backward(case.grad)
    torchs, exact = case.by_autograd(), case.to(torch.float64).by_autograd()
    written = {"down_weight": down.weight} if without == "up_rows" else {"up_weight": up.weight}
    assert_all_within_twice({"out": out.detach(), "x": leaves[0].grad, **written}, torchs, exact)
    trained = {name: leaf.grad is not None for name, leaf in zip(PARTS, leaves[1:], strict=True)}
    of_up = without == "up_rows"
    assert trained == {"up_weight": of_up, "up_bias": of_up, "down_weight": not of_up}


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
@pytest.mark.parametrize("name", CASES)
def test_onednns_products_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two multiply is a matter of rounding, on a machine that has both."""
    case = Case(name)
    torchs, exact = case.by_autograd(), case.to(torch.float64).by_autograd()
    for ours in (True, False):
        monkeypatch.setattr(linear_module, "MULTIPLIES_BF16", ours)
        assert is_ours(case.x) is ours
        assert_all_within_twice(case.run(), torchs, exact)
        with torch.no_grad():
            assert_within_twice(kernels.feed_forward(*case.tensors), torchs["out"], exact["out"])


@needs_bf16
def test_which_operators_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("odd widths, a task without tokens")

    def operators() -> set[str]:
        with torch.profiler.profile() as profile:
            case.run()
        names = {event.key for event in profile.key_averages()}
        return {n for n in names if n.startswith("superbert::") or "gelu" in n}

    own = {"linear_bf16_gelu", "linear_bf16_gelu_grad_input", "linear_bf16"}
    own |= {"linear_bf16_grad_input", "linear_bf16_task_gradients_"}
    assert operators() == {f"superbert::{name}" for name in own}
    monkeypatch.setattr(linear_module, "MULTIPLIES_BF16", False)
    assert {"aten::gelu", "aten::gelu_backward"} <= operators()


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
def test_the_number_of_threads_makes_no_difference() -> None:
    case, found = Case("BERT"), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(case.run())
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


@pytest.mark.usefixtures("bf16_unit")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strides_make_no_difference(dtype: torch.dtype) -> None:
    case = Case("odd widths, a task without tokens", dtype)
    for part in ("x", *PARTS, "grad"):
        for kind, view in strided(getattr(case, part)):
            other, same = case.to(dtype), case.to(dtype)
            setattr(other, part, view)
            setattr(same, part, view.contiguous())
            for name, tensor in other.run().items():
                torch.testing.assert_close(tensor, same.run()[name], msg=f"{name}, {part} {kind}")


# ---- GELU of every bfloat16 ----------------------------------------------------------------------

ALL = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
SMALLEST = 2.0**-126  # products take smaller numbers for zero


def half_ulp(x: Tensor) -> Tensor:
    """Of bfloat16, whose numbers have 8 bits."""
    return torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 9)


def gelu_of_all() -> Tensor:
    """Each of them is a bias of a product that is zero."""
    x, weight = torch.zeros(1, 1).bfloat16(), torch.zeros(len(ALL), 1).bfloat16()
    out, activated = OPS.linear_bf16_gelu(x, weight, ALL)
    normal = ALL.abs() >= SMALLEST
    assert torch.equal(out[0, normal], ALL[normal])
    return activated[0]


def slope_of_all() -> Tensor:
    """Each of them multiplies a product that is one."""
    one = torch.ones(1, 1).bfloat16()
    return OPS.linear_bf16_gelu_grad_input(one, one.expand(1, len(ALL)), ALL[None])[0]


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
def test_gelu_of_all_numbers() -> None:
    """By erfc, since 1 + erf has no digits where x is far below zero.

    In float64 the polynomials of csrc/linear_simd.h are wrong by 0.94 * 2^-13 of Phi(-|x|) at
    most, and by 1.9 * 2^-13 with a reciprocal that is off by the 2^-14 that a processor may take.
    """
    found, x = gelu_of_all(), ALL.double()
    exact = x * torch.erfc(-x / 2**0.5) / 2
    # What may round to less than the smallest number is left to the test below.
    normal = x.isfinite() & (exact.abs() >= SMALLEST * (1 + 2.0**-12))
    assert normal.sum() > 2**15
    error = (found.double() - exact).abs() - half_ulp(exact)
    assert (error[normal] <= 2.0**-12 * exact.abs()[normal]).all()


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
def test_gelu_at_the_ends() -> None:
    found, x = gelu_of_all(), ALL.double()
    exact = x * torch.erfc(-x / 2**0.5) / 2
    assert not found[exact.abs() < SMALLEST].any()  # zero, rather than a subnormal number
    assert torch.equal(found.isnan(), ALL.isnan())
    assert found[ALL.isposinf()].isposinf().all()
    assert (found[ALL.isneginf()] == 0).all()
    assert torch.equal(found.isinf(), ALL.isposinf())


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
def test_the_derivative_of_gelu_at_all_numbers() -> None:
    """It is about one at most, so its error is absolute; far out nothing but 0 and 1 is left."""
    found, x = slope_of_all(), ALL.double()
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    exact = torch.erfc(-x / 2**0.5) / 2 + x * density
    exact[ALL.isneginf()], exact[ALL.isposinf()] = 0, 1
    assert torch.equal(found.isnan(), ALL.isnan())
    number = ~ALL.isnan()
    error = (found.double() - exact).abs() - half_ulp(exact)
    assert (error[number] <= 2.0**-13).all()
    assert (found[number & (ALL <= -16)] == 0).all()
    assert (found[number & (ALL >= 16)] == 1).all()


# What gelu of the negative of is about the smallest normal number, 2^-126.
AROUND_13 = [12.5, 13.0, 13.0625, 13.125, 13.1875, 13.25, 13.3125, 13.5, 14.0, 14.5]
EXTREMES = [0.0, 2.0**-126, 2.0**-60, 1.0, 100.0, 1e19, 3e38, torch.inf]


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
@pytest.mark.parametrize("columns", [1, 17, 33])
def test_gelu_of_products_at_its_ends(columns: int) -> None:
    """Of sums, not of a bias; each of them beside NaN, infinity and numbers far from its own."""
    positive = torch.tensor(AROUND_13 + EXTREMES)
    values = torch.cat([positive, torch.tensor([torch.nan]), -positive]).bfloat16()[:, None]
    out, activated = OPS.linear_bf16_gelu(values, torch.ones(columns, 1).bfloat16(), None)
    assert torch.equal(out.nan_to_num(), values.nan_to_num().expand_as(out))
    x = values.double()
    exact = (x * torch.erfc(-x / 2**0.5) / 2).expand_as(out)
    exact = torch.where(x.isneginf(), 0.0, exact)
    assert torch.equal(activated.isnan(), x.isnan().expand_as(out))
    assert torch.equal(activated.isinf(), x.isposinf().expand_as(out))
    normal = exact.isfinite() & (exact.abs() >= SMALLEST)
    assert not activated[exact.abs() < SMALLEST].any()
    error = (activated.double() - exact).abs() - half_ulp(exact)
    assert (error[normal] <= 2.0**-12 * exact.abs()[normal]).all()

    ones = torch.ones(len(values), 1).bfloat16()
    found = OPS.linear_bf16_gelu_grad_input(ones, ones[:1].expand(1, columns), out)
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    slope = torch.erfc(-x / 2**0.5) / 2 + torch.where(x.isinf(), 0.0, x * density)
    slope = slope.expand_as(out)
    assert torch.equal(found.isnan(), x.isnan().expand_as(out))
    number = ~found.isnan()
    assert ((found.double() - slope).abs() - half_ulp(slope))[number].max() <= 2.0**-13


@needs_bf16
@pytest.mark.usefixtures("bf16_unit")
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 47, 49])  # lanes of the last vector
def test_every_lane_has_the_same_gelu(columns: int) -> None:
    values = torch.linspace(-4, 4, columns).bfloat16()
    x, weight = torch.zeros(9, 1).bfloat16(), torch.zeros(columns, 1).bfloat16()
    place = ALL.view(torch.int16).int() + 2**15
    index = torch.searchsorted(place.sort().values, values.view(torch.int16).int() + 2**15)
    _, activated = OPS.linear_bf16_gelu(x, weight, values)
    assert torch.equal(activated, gelu_of_all()[index].expand(9, columns))
    ones = torch.ones(9, 1).bfloat16()
    slopes = OPS.linear_bf16_gelu_grad_input(
        ones, ones[:1].expand(1, columns), values.expand(9, -1)
    )
    assert torch.equal(slopes, slope_of_all()[index].expand(9, columns))


@pytest.mark.usefixtures("bf16_unit")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_nan_stays_in_its_row_and_task(dtype: torch.dtype) -> None:
    case = Case("odd widths, a task without tokens", dtype)
    case.x[3, 2] = torch.nan  # of task 0
    found, at = case.run(), torch.arange(len(case.x)) == 3
    for name in ("out", "x"):
        assert torch.equal(found[name].isnan().any(1), at), name
    for name in PARTS:
        assert found[name][0].isnan().any()
        assert found[name][1:].isfinite().all()


# ---- autograd, transforms, torch.compile ---------------------------------------------------------


def by_task(case: Case, x: Tensor) -> Tensor:
    up, down = case.rows()
    segments = TaskSegments(case.offsets)
    return kernels.feed_forward(x, *case.tensors[1:], up_rows=up, down_rows=down, segments=segments)


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).float().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_are_refused_with_rows(kind: str) -> None:
    case = Case("odd widths, a task without tokens")
    with pytest.raises(NotImplementedError, match=r"with task rows: cannot .+; use the layer"):
        TRANSFORMS[kind](lambda x: by_task(case, x), case.x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's forward mode
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_without_rows(kind: str, graph: bool) -> None:
    case = Case("odd widths, a task without tokens")
    weights = case.tensors[1:]

    def plain(x: Tensor) -> Tensor:
        own = [weight.to(x.dtype) for weight in weights]
        return F.linear(F.gelu(F.linear(x, *own[:2])), own[2])

    with torch.set_grad_enabled(graph):
        found = TRANSFORMS[kind](lambda x: kernels.feed_forward(x, *weights), case.x)
        torchs, exact = (TRANSFORMS[kind](plain, x) for x in (case.x, case.x.double()))
    assert_within_twice(found, torchs, exact)


def test_a_second_derivative_is_refused_with_rows() -> None:
    case = Case("odd widths, a task without tokens")
    x = case.x.requires_grad_()
    (grad,) = torch.autograd.grad(by_task(case, x).float().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot differentiate twice"):
        grad.sum().backward()


def test_an_operand_that_changes_before_the_backward_pass_is_refused() -> None:
    case = Case("odd widths, a task without tokens")
    out = by_task(case, case.x.requires_grad_())
    case.up_weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("rows", [False, True])
def test_under_autocast(rows: bool) -> None:
    """Two linear layers of bfloat16, as of float32 operands."""
    case = Case("odd widths, a task without tokens", torch.float32)
    exact = case.to(torch.float64).by_autograd()
    x = case.x.detach().requires_grad_()
    weights = [tensor.detach().requires_grad_() for tensor in case.tensors[1:]]
    up, down = case.rows()
    own = {"up_rows": up, "down_rows": down, "segments": TaskSegments(case.offsets)}
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.feed_forward(x, *weights, **(own if rows else {}))
        plain = F.linear(F.gelu(F.linear(x, *weights[:2])), weights[2])
        # Layers with rows need autocast in the backward pass, too.
        (found,) = torch.autograd.grad(out, x, case.grad.bfloat16())
        (torchs,) = torch.autograd.grad(plain, x, case.grad.bfloat16())
    assert out.dtype == torch.bfloat16
    assert_within_twice(out, plain, exact["out"])
    assert found.dtype == torch.float32
    assert_within_twice(found, torchs, exact["x"])
    if rows:
        assert up.weight.isfinite().all()
        assert down.weight.isfinite().all()


def test_bfloat16_under_autocast_of_the_cpu() -> None:
    """Autocast's own casts are no reason to take another path than without it."""
    case = Case("odd widths, a task without tokens")
    with torch.autocast("cpu", torch.bfloat16):
        found = case.run()
    assert_all_within_twice(found, case.by_autograd(), case.to(torch.float64).by_autograd())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("rows", [False, True])
def test_compiled_in_one_graph_for_any_number_of_rows(rows: bool) -> None:
    torch._dynamo.reset()
    case = Case("past a block of rows and a panel")

    def run(function: Any, tokens: int) -> list[Tensor]:
        up, down = case.rows()
        segments = TaskSegments((0, 5, tokens))
        own = {"up_rows": up, "down_rows": down, "segments": segments} if rows else {}
        leaves = [t.detach().requires_grad_() for t in (case.x[:tokens], *case.tensors[1:])]
        out = function(*leaves, **own)
        out.backward(case.grad[:tokens])
        grads = [leaf.grad for leaf in leaves if leaf.grad is not None]
        return [out.detach(), *grads, *((up.buffer, down.buffer) if rows else ())]

    compiled = torch.compile(
        kernels.feed_forward, fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (11, 77):
        for found, expected in zip(
            run(compiled, tokens), run(kernels.feed_forward, tokens), strict=True
        ):
            torch.testing.assert_close(found, expected, equal_nan=True)


# ---- what is refused -----------------------------------------------------------------------------


def wrong_arguments(case: Case) -> Iterator[tuple[dict[str, Any], str]]:
    up, down = case.rows()
    yield {"segments": None}, "segments: needed with rows"
    yield {"up_rows": new_task_rows(2, case.up_weight, case.up_bias)}, r"rows\.buffer: expected"
    yield {"down_rows": new_task_rows(2, case.down_weight)}, r"rows\.buffer: expected"
    yield {"down_rows": up}, r"rows\.weight_columns: expected the shape"
    yield {"up_rows": up._replace(bias_columns=None)}, r"rows\.bias_columns: None, but"
    yield {"down_rows": down._replace(weight_columns=None)}, r"rows\.weight_columns: None, but"
    yield {"down_rows": down._replace(bias_columns=Columns(0, (5,)))}, r"rows\.bias_columns: "
    yield {"segments": TaskSegments((0, 7, 9, 21))}, r"segments\.offsets: "
    yield {"x": case.x[None]}, r"rows: task gradients need x \[T, I\]"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("graph", [True, False])
def test_what_does_not_fit_is_named(dtype: torch.dtype, graph: bool) -> None:
    case = Case("odd widths, a task without tokens", dtype)
    up, down = case.rows()
    for change, expected in wrong_arguments(case):
        given = {"x": case.x, "up_rows": up, "down_rows": down}
        given |= {
            name: x.detach().requires_grad_() for name, x in vars(case).items() if name in PARTS
        }
        given["segments"] = TaskSegments(case.offsets)
        with torch.set_grad_enabled(graph), pytest.raises(ValueError, match=expected):
            kernels.feed_forward(**(given | change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("given", [("up_rows",), ("down_rows",), ("up_rows", "down_rows")])
def test_rows_need_segments(given: tuple[str, ...], graph: bool, dtype: torch.dtype) -> None:
    case = Case("odd widths, a task without tokens", dtype)
    rows = dict(zip(("up_rows", "down_rows"), case.rows(), strict=True))
    with torch.set_grad_enabled(graph), pytest.raises(ValueError, match="segments: needed"):
        kernels.feed_forward(*case.tensors, **{name: rows[name] for name in given})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("graph", [True, False])
def test_freed_operands_are_refused(graph: bool, dtype: torch.dtype) -> None:
    case = Case("odd widths, a task without tokens", dtype)
    for i, name in enumerate(("x", *PARTS)):
        tensors = list(case.tensors)
        tensors[i] = freed(tensors[i])
        with torch.set_grad_enabled(graph), pytest.raises(ValueError, match=f"^{name}: "):
            kernels.feed_forward(*tensors)
        up, down = case.rows()
        own = {"up_rows": up, "down_rows": down, "segments": TaskSegments(case.offsets)}
        with pytest.raises(ValueError, match=f"^{name}: "):
            kernels.feed_forward(*tensors, **own)
        for rows in (up, down):
            rows.buffer.untyped_storage().resize_(0)
            with pytest.raises(ValueError, match=r"^rows\.buffer: "):
                kernels.feed_forward(*case.tensors, **own)


@needs_bf16
def test_saved_tensors_that_hooks_change_are_refused() -> None:
    """Whatever a hook makes of them ends in an exception of one line."""
    case = Case("odd widths, a task without tokens")
    x = case.x.requires_grad_()
    saved = saved_by(lambda: by_task(case, x))
    assert len(saved) == 6
    for number, tensor in enumerate(saved):
        wrongs = list(changed(tensor, of_torch=False))
        for kind, wrong in wrongs:
            numbers = iter(range(len(saved)))

            def pack(held: Tensor, wrong: Tensor = wrong, numbers: Any = numbers) -> Tensor:
                return wrong if next(numbers) == number else held  # noqa: B023

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
                out = by_task(case, x)
            with pytest.raises((ValueError, IndexError, RuntimeError)) as error:
                out.backward(case.grad)
            assert "\n" not in str(error.value), (number, kind)


def test_saved_on_the_way_and_checkpointed() -> None:
    case = Case("odd widths, a task without tokens")
    expected = case.run()
    with torch.autograd.graph.save_on_cpu():
        found = case.run()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    up, down = case.rows()
    x = case.x.detach().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda x: kernels.feed_forward(
            x,
            *case.tensors[1:],
            up_rows=up,
            down_rows=down,
            segments=TaskSegments(case.offsets),
        ),
        x,
        use_reentrant=False,
    )
    out.backward(case.grad)
    assert torch.equal(x.grad, expected["x"])
    assert torch.equal(up.weight, expected["up_weight"])
    assert torch.equal(down.weight, expected["down_weight"])
