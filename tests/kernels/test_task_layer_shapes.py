"""Layers that run as this package's own, on the shapes and options that torch takes.

Each call is made plainly in float64, plainly, and where task gradients are collected: shapes are
equal, errors of torch are torch's, and results and gradients keep the 2x rule.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from kernels import Columns, TaskGradients, TaskRows, TaskSegments, layer_norm

DTYPES = [torch.float32, torch.float64]
Call = Callable[[Tensor, dict[str, Tensor]], Tensor]


class Parameters(nn.ParameterDict):
    """Parameters of all shapes that a layer of width 5 may be given."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        shapes = {
            "matrix": (3, 5),
            "vector": (5,),
            "scalar": (),
            "bias": (3,),
            "one": (1,),
            "block": (2, 5),
            "no_input": (3, 0),
            "no_output": (0, 5),
            "nothing": (0,),
        }
        values = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
        super().__init__({name: nn.Parameter(value) for name, value in values.items()})


def inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    values = torch.randn(4, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = values.to(dtype)
    return {
        "[4, 2, 5]": whole,
        "[2, 5]": whole[0],
        "[1, 5]": whole[0, :1],
        "[5]": whole[0, 0],
        "[0, 2, 5]": whole[:0],
        "[0, 5]": whole[:0, 0],
        "[4, 0, 5]": whole[:, :0],
        "[4, 0]": whole[:, 0, :0],
        "[]": whole[0, 0, 0],
    }


def linear_calls() -> Iterator[tuple[str, Call]]:
    weights = ("matrix", "vector", "no_input", "no_output")
    for weight, bias in product(weights, (None, "bias", "scalar", "one", "nothing")):
        yield f"linear {weight} {bias}", lambda x, p, w=weight, b=bias: F.linear(x, p[w], p.get(b))


def norm_calls() -> Iterator[tuple[str, Call]]:
    parts = [(None, "vector"), ("vector", None), ("vector", "vector"), ("bias", "vector")]
    shapes = {(5,): parts, (3,): [("vector", None), ("bias", "bias")], (0,): [("nothing", None)]}
    shapes[(2, 5)] = [("block", None), (None, "block"), ("block", "block"), ("vector", None)]
    for shape, pairs in shapes.items():
        for weight, bias in pairs:
            yield (
                f"norm {list(shape)} {weight} {bias}",
                lambda x, p, s=shape, w=weight, b=bias: F.layer_norm(x, s, p.get(w), p.get(b)),
            )


INDICES = {
    "[]": torch.tensor(1),
    "[2]": torch.tensor([1, 1]),
    "[1, 3] int32": torch.tensor([[0, 1, 1]], dtype=torch.int32),
    "[0]": torch.zeros(0, dtype=torch.int64),
    "[2, 0]": torch.zeros(2, 0, dtype=torch.int64),
    "too large": torch.tensor([3]),
    "negative": torch.tensor([-1]),
    "floating": torch.tensor([1.0]),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"padding_idx": 1},
    {"padding_idx": -2},
    {"padding_idx": 3},
    {"padding_idx": -4},
    {"max_norm": 1.0},
    {"max_norm": 1.0, "norm_type": 1.0, "padding_idx": 0},
    {"scale_grad_by_freq": True},
    {"scale_grad_by_freq": True, "padding_idx": 1},
    {"sparse": True},
    {"sparse": True, "padding_idx": 1},
    {"sparse": True, "max_norm": 1.0},
]


def embedding_calls() -> Iterator[tuple[str, Call]]:
    for options, (name, index) in product(OPTIONS, INDICES.items()):
        if index.dim() == 0 and {"sparse", "padding_idx"} <= options.keys():
            continue  # torch's own backward pass fails
        yield (
            f"embedding {name} {options}",
            lambda _, p, i=index, o=options: F.embedding(i, p["matrix"], **o),
        )
    yield "embedding in a vector", lambda _, p: F.embedding(INDICES["[2]"], p["vector"])


CASES = [
    *(
        (f"{name} {x}", call, x)
        for name, call in [*linear_calls(), *norm_calls()]
        for x in inputs(torch.float32)
    ),
    *((name, call, "[5]") for name, call in embedding_calls()),
]


def assert_close(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """The 2x rule on the norm of the error; in float64, its own reference, 64 roundings."""
    assert ours.shape == torchs.shape == exact.shape
    assert ours.dtype == torchs.dtype
    roundings = 64 if ours.dtype == torch.float64 else 1
    allowed = 2 * (torchs.double() - exact).norm()
    allowed += roundings * torch.finfo(ours.dtype).eps * exact.norm()
    assert (ours.double() - exact).norm() <= allowed


def run(
    call: Call, x: str, dtype: torch.dtype, collect: bool
) -> tuple[Tensor, dict[str, Tensor]] | tuple[type, str]:
    """The result, and the gradient of each parameter; or the error."""
    parameters = Parameters(dtype)
    collector = TaskGradients(parameters, 2) if collect else None
    try:
        if collector is None:
            out = call(inputs(dtype)[x], dict(parameters))
        else:
            with collector.task(1):
                out = call(inputs(dtype)[x], dict(parameters))
    except (RuntimeError, IndexError, AssertionError) as error:
        return type(error), str(error)
    out.backward(torch.linspace(-1, 1, out.numel(), dtype=dtype).view(out.shape))
    if collector is not None:
        assert all(parameter.grad is None for parameter in parameters.values())
        assert not collector.rows[0].any()
        return out.detach(), {name: rows[1] for name, rows in collector.named_views()}
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.to_dense()
        for name, p in parameters.items()
    }
    return out.detach(), gradients


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_a_task_a_call_is_torchs(dtype: torch.dtype) -> None:
    failed = 0
    for name, call, x in CASES:
        exact, torchs, ours = (
            run(call, x, *how) for how in ((torch.float64, False), (dtype, False), (dtype, True))
        )
        if isinstance(torchs[0], type):
            failed += 1
            assert ours == torchs, name
            continue
        assert isinstance(ours[0], Tensor), (name, ours)
        try:
            assert_close(ours[0], torchs[0], exact[0])
            for parameter, gradient in ours[1].items():
                assert_close(gradient, torchs[1][parameter], exact[1][parameter])
        except AssertionError as error:
            raise AssertionError(name) from error
    assert 50 < failed < len(CASES) - 100


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", ["weight", "bias", "both"])
@pytest.mark.parametrize("has", ["weight", "bias", "both"])
@pytest.mark.parametrize("layer", ["linear", "norm"])
@pytest.mark.parametrize("tokens", [(20, 37), (0, 31), (0, 0)])
def test_on_all_tasks_without_a_weight_or_a_bias(
    layer: str, has: str, trained: str, tokens: tuple[int, int], dtype: torch.dtype
) -> None:
    if "both" not in (has, trained) and has != trained:
        has = "both"  # what is not trained is there, and frozen
    if layer == "linear" and has == "bias":
        has = "both"  # a linear layer has a weight

    def run(dtype: torch.dtype, collect: bool) -> list[Tensor]:
        torch.manual_seed(0)
        weight, bias = torch.randn((40, 40) if layer == "linear" else 40), torch.randn(40)
        x, grad = (torch.randn(sum(tokens), 40).to(dtype) for _ in range(2))
        x.requires_grad_()
        named = {"weight": weight, "bias": bias}
        given = nn.ParameterDict(
            {
                name: nn.Parameter(value.to(dtype), requires_grad=trained in (name, "both"))
                for name, value in named.items()
                if has in (name, "both")
            }
        )
        weight, bias = given.get("weight"), given.get("bias")

        def call() -> Tensor:
            if layer == "linear":
                return F.linear(x, weight, bias)
            return F.layer_norm(x, (40,), weight, bias)

        if collect:
            collector = TaskGradients(given, 2)
            with collector.batch(tokens):
                out = call()
            out.backward(grad)
            return [out.detach(), x.grad, *(rows for _, rows in collector.named_views())]
        out = call()
        losses = [(out * grad).split(tokens)[task].sum() for task in range(2)]
        own = [p for p in given.values() if p.requires_grad]
        rows = [torch.autograd.grad(loss, own, retain_graph=True) for loss in losses]
        (of_x,) = torch.autograd.grad(sum(losses), x)
        return [out.detach(), of_x, *map(torch.stack, zip(*rows, strict=True))]

    for ours, torchs, exact in zip(
        run(dtype, True), run(dtype, False), run(torch.float64, False), strict=True
    ):
        assert_close(ours, torchs, exact)


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (lambda x, p: F.linear(x, p["vector"]), "vector: used by .*linear on"),
        (lambda x, p: F.linear(x, p["matrix"], p["scalar"]), "matrix: used by .*linear on"),
        (lambda x, p: F.linear(x, torch.ones(3, 5), p["one"]), "one: used by .*linear on"),
    ],
)
def test_on_all_tasks_unusual_shapes_are_refused_by_name(layer: Call, what: str) -> None:
    parameters = Parameters(torch.float32)
    collector = TaskGradients(parameters, 2)
    with pytest.raises(NotImplementedError, match=what + ".*within `task"), collector.batch([2, 2]):
        layer(inputs(torch.float32)["[4, 2, 5]"], dict(parameters))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, rows, segments: kernels.linear(
            x, torch.ones(5), rows=TaskRows(rows, Columns(0, (5,))), segments=segments
        ),
        lambda x, rows, segments: kernels.linear(
            x[None],
            torch.ones(1, 5),
            rows=TaskRows(rows, Columns(0, (1, 5))),
            segments=TaskSegments((0, 1, 1)),
        ),
        lambda x, rows, segments: kernels.embedding(
            torch.zeros(4, 2, dtype=torch.int64),
            torch.ones(1, 5),
            rows=TaskRows(rows, Columns(0, (1, 5))),
            segments=segments,
        ),
        lambda x, rows, segments: layer_norm(
            x[None],
            torch.ones(5),
            rows=TaskRows(rows, Columns(0, (5,))),
            segments=TaskSegments((0, 1, 1)),
        ),
    ],
)
def test_functions_with_task_rows_say_what_shapes_they_take(function: Any) -> None:
    with pytest.raises(ValueError, match=r"^rows: task gradients need "):
        function(torch.ones(4, 5), torch.zeros(2, 5), TaskSegments((0, 2, 4)))


TRANSFORMS: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "vmap": lambda layer, x: torch.func.vmap(layer)(x),
    "vmap of a product": lambda layer, x: torch.func.vmap(lambda row: row @ layer.weight.T)(x),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x),
    "jacrev": lambda layer, x: torch.func.jacrev(lambda x: layer(x).square().sum(0))(x),
}


def contexts(collector: TaskGradients) -> list[AbstractContextManager[None]]:
    return [collector.task(1), collector.batch([2, 2])]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions(transform: str) -> None:
    layer = nn.Linear(5, 3).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    expected = torch.autograd.grad(
        TRANSFORMS[transform](layer, x).sin().sum(), list(layer.parameters()), allow_unused=True
    )
    collector = TaskGradients(layer, 2)
    for context in contexts(collector):
        with pytest.raises(NotImplementedError, match=r"inside torch\.func.*view_as"), context:
            TRANSFORMS[transform](layer, x)

    with collector.task(1):  # as the message says
        views = {name: p.view_as(p) for name, p in layer.named_parameters()}
    stand_in = nn.Linear(5, 3)
    for name, view in views.items():
        delattr(stand_in, name)
        setattr(stand_in, name, view)
    with collector.task(1):
        out = TRANSFORMS[transform](stand_in, x)
    out.sin().sum().backward()
    for (_, rows), gradient in zip(collector.named_views(), expected, strict=True):
        torch.testing.assert_close(
            rows[1], torch.zeros_like(rows[1]) if gradient is None else gradient
        )


def test_vmap_over_a_parameter_is_named() -> None:
    parameters = nn.ParameterList([nn.Parameter(torch.ones(3, 2))])
    collector = TaskGradients(parameters, 2)
    with collector.task(0):
        out = torch.func.vmap(lambda row: row.square().sum())(parameters[0])
    with pytest.raises(RuntimeError, match=r"^0: .* torch\.func, which take"):
        out.sum().backward()
    with collector.task(0):
        view = parameters[0].view_as(parameters[0])
        torch.func.vmap(lambda row: row.square().sum())(view).sum().backward()
    assert torch.equal(next(collector.named_views())[1][0], torch.full((3, 2), 2.0))
