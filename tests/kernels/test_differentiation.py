"""Derivatives of every layer, of every kind: right, or refused by name, and never dropped."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import balancing

from .layer_cases import LAYERS, Stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # torch's forward mode
]
TOKENS = 7


def stream_of(dtype: torch.dtype) -> Stream:
    torch.manual_seed(0)
    parts = (
        part.detach().to(dtype if part.is_floating_point() else part.dtype)
        if isinstance(part, Tensor)
        else part
        for part in Stream.of(TOKENS)
    )
    return Stream(*parts)


def function_of(layer_name: str, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A layer as a function of its input, or of its table, and a point."""
    stream = stream_of(dtype)
    field = "table" if layer_name.startswith("embedding") else "x"
    return lambda x: LAYERS[layer_name](stream._replace(**{field: x})), getattr(stream, field)


def loss_of(f: Callable[[Tensor], Tensor], power: int) -> Callable[[Tensor], Tensor]:
    def loss(x: Tensor) -> Tensor:
        out = f(x).flatten()
        return (out**power * torch.linspace(-1, 2, len(out), dtype=x.dtype)).sum()

    return loss


def tangent_at(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)


def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, tangent_at(x))
        return forward_ad.unpack_dual(f(dual)).tangent.clone()


def forward_mode_without_grad(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return forward_mode(f, x)


def twice(f: Callable[[Tensor], Tensor], x: Tensor, power: int) -> Tensor:
    x = x.clone().requires_grad_()
    loss = loss_of(f, power)(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True, materialize_grads=True)
    return torch.autograd.grad((grad * tangent_at(x)).sum() + 0 * x.sum(), x)[0]


def batched(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Several gradients at once, by the older of torch's two ways to batch."""
    x = x.clone().requires_grad_()
    out = f(x)
    grads = torch.stack([tangent_at(out), tangent_at(out) ** 2])
    return torch.autograd.grad(out, x, grads, is_grads_batched=True)[0]


def reverse_over_reverse(f: Callable[[Tensor], Tensor], x: Tensor, power: int) -> Tensor:
    grad = torch.func.grad(loss_of(f, power))
    return torch.func.grad(lambda y: (grad(y) * tangent_at(x)).sum())(x)


def forward_over_reverse(f: Callable[[Tensor], Tensor], x: Tensor, power: int) -> Tensor:
    return torch.func.jvp(torch.func.grad(loss_of(f, power)), (x,), (tangent_at(x),))[1]


def jacobian_of_jacobian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.func.jacrev(torch.func.jacrev(loss_of(f, 3)))(x)


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "forward mode": forward_mode,
    "forward mode without grad": forward_mode_without_grad,
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (tangent_at(x),))[1],
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](tangent_at(x)),
    "twice": lambda f, x: twice(f, x, 3),
    "twice of a linear loss": lambda f, x: twice(f, x, 1),
    **{
        f"{name} of {loss}": partial(derivative, power=power)
        for name, derivative in (
            ("forward over reverse", forward_over_reverse),
            ("reverse over reverse", reverse_over_reverse),
        )
        for loss, power in (("a linear loss", 1), ("a cubic loss", 3))
    },
    "jacobian of jacobian": jacobian_of_jacobian,
    "hessian": lambda f, x: torch.func.hessian(loss_of(f, 3))(x),
    "jacobian": lambda f, x: torch.func.jacrev(lambda y: f(y).flatten()[:3])(x),
    "batched": batched,
    "grad": lambda f, x: torch.func.grad(loss_of(f, 3))(x),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(loss_of(f, 3)))(
        torch.stack([x, 2 * x])
    ),
}
REFUSAL = r"(\w+)(?: with task rows)?: cannot .+; use .+"


def outcome(kind: str, layer_name: str, dtype: torch.dtype) -> Tensor | str:
    """The derivative, or the message of its refusal."""
    try:
        return DERIVATIVES[kind](*function_of(layer_name, dtype))
    except NotImplementedError as error:
        return str(error)


@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("layer_name", LAYERS)
def test_a_derivative_is_right_or_refused(layer_name: str, kind: str) -> None:
    found = outcome(kind, layer_name, torch.float32)
    # torch cannot trace references that look at values, as linearize has to.
    exact = outcome("jvp" if kind == "linearize" else kind, layer_name, torch.float64)
    for result in (found, exact):
        if isinstance(result, str):
            assert re.fullmatch(REFUSAL, result)
            assert result.replace(":", " ").split()[0] in kernels.__all__
    by_task = "by task" in layer_name
    assert by_task or isinstance(exact, Tensor)
    if isinstance(found, Tensor) and isinstance(exact, Tensor):
        torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4)
    assert isinstance(found, Tensor) or kind != "grad" or by_task


@pytest.mark.parametrize(
    "layer_name", [layer_name for layer_name in LAYERS if "by task" not in layer_name]
)
def test_derivatives_in_float64_are_those_of_differences(layer_name: str) -> None:
    f, x = function_of(layer_name, torch.float64)
    x = x.clone().requires_grad_()
    torch.autograd.gradcheck(f, x, fast_mode=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_a_parameters_gradient_is_not_taken_for_a_constant() -> None:
    """A gradient that the kernel writes in place of returning it."""
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    out = kernels.layer_norm(x, weight, None)
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    for leaf in (x, weight):
        with pytest.raises(NotImplementedError, match=r"^layer_norm: cannot differentiate twice"):
            torch.autograd.grad(grad.sum(), leaf, retain_graph=True)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_that_is_not_differentiated_costs_no_refusal() -> None:
    """``backward(create_graph=True)``, as second-order optimizers call it for other layers."""
    x, weight = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    other = torch.randn(8, requires_grad=True)
    loss = kernels.layer_norm(x, weight).sum() + other.pow(3).sum()
    loss.backward(create_graph=True)
    assert weight.grad is not None
    assert other.grad is not None
    (second,) = torch.autograd.grad(other.grad.sum(), other)
    torch.testing.assert_close(second, 6 * other.detach())


@pytest.mark.parametrize("create_graph", [False, True])
def test_under_checkpointing_and_hooks_on_saved_tensors(create_graph: bool) -> None:
    """Either lets a saved tensor be unpacked once."""
    layer_name, x = function_of("dropout_add_layer_norm", torch.float32)
    expected = torch.func.grad(loss_of(layer_name, 3))(x)
    x.requires_grad_()
    loss = checkpoint(loss_of(layer_name, 3), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    assert torch.equal(grad, expected)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(layer_name, 3)(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=create_graph)
    assert torch.equal(grad, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch looks at
@pytest.mark.parametrize(
    "layer_name", [layer_name for layer_name in LAYERS if "by task" not in layer_name]
)
def test_under_compiled_autograd(layer_name: str) -> None:
    f, x = function_of(layer_name, torch.float32)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(f, 3)(x), x)
    loss = loss_of(f, 3)(x)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    torch.testing.assert_close(x.grad, expected)


def test_nodes_of_the_graph_have_names() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    y = kernels.layer_norm(x)  # kept: in torch 2.11 a node has no name without its output
    assert y.grad_fn is not None
    assert "layer_norm" in y.grad_fn.name()


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "pcgrad_weights": lambda gram: kernels.pcgrad_weights(gram, torch.arange(3).repeat(3, 1)),
    "main_aux": balancing.main_aux,
    "upgrad": balancing.upgrad,
    "mgda": balancing.mgda,
    "cagrad": balancing.cagrad,
    "nash_mtl": balancing.nash_mtl,
    "fairgrad": balancing.fairgrad,
    "imtl_g": balancing.imtl_g,
    "aligned_mtl": balancing.aligned_mtl,
    "config": balancing.config,
}


@pytest.mark.parametrize("method", METHODS)
def test_weights_have_no_derivative(method: str) -> None:
    rows = torch.randn(3, 5, dtype=torch.float64)
    gram = (rows @ rows.T).requires_grad_()
    with pytest.raises(NotImplementedError, match=r"has no derivative; use gram\.detach\(\)$"):
        METHODS[method](gram).sum().backward()
    with pytest.raises(NotImplementedError, match=r"forward mode; use gram\.detach\(\)$"):
        forward_mode(METHODS[method], gram.detach())


def test_the_gram_matrix_and_the_combination_are_differentiable_twice() -> None:
    rows = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(kernels.gram, rows)
    torch.autograd.gradgradcheck(kernels.combine, (rows, weights))
    for function, name in ((kernels.gram, "gram"), (lambda x: kernels.combine(x, weights), "com")):
        with pytest.raises(NotImplementedError, match=f"^{name}.*forward mode"):
            forward_mode(function, rows.detach())


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gram": (kernels.gram, lambda rows: rows @ rows.T),
    "gram of segments": (
        lambda rows: kernels.gram(rows, [1, 3, 4]),
        lambda rows: torch.stack([part @ part.T for part in (rows[:, 1:3], rows[:, 3:4])]),
    ),
    "combine": (
        lambda rows: kernels.combine(rows, torch.arange(3, dtype=rows.dtype)),
        lambda rows: torch.arange(3, dtype=rows.dtype) @ rows,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", DERIVATIVES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_derivative_of_surgery_is_right_or_refused(
    name: str, kind: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 5, dtype=dtype)
    ours, plain = FUNCTIONS[name]
    forward = kind in ("forward mode", "forward mode without grad", "jvp", "linearize", "hessian")
    if forward or kind.startswith("forward over reverse"):
        with pytest.raises(NotImplementedError, match=REFUSAL):
            DERIVATIVES[kind](ours, rows)
        return
    found = DERIVATIVES[kind](ours, rows)
    expected = DERIVATIVES[kind](plain, rows.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in DERIVATIVES if kind != "vmap"])
def test_weights_of_gradvac_have_no_derivative(kind: str) -> None:
    def weights(rows: Tensor) -> Tensor:
        matrix = rows @ rows.T
        step = balancing.gradvac(matrix, kernels.draw_order(3, 1), torch.zeros_like(matrix))
        return torch.cat([step.weights, step.targets.flatten()])

    rows = torch.randn(3, 5, dtype=torch.float64)
    assert weights(rows).isfinite().all()
    with pytest.raises(NotImplementedError, match=r"^gradvac: has no derivative; use gram\.detach"):
        DERIVATIVES[kind](weights, rows)


def test_a_linear_layer_without_a_graph_keeps_tangents() -> None:
    """Where products run that know none: this project's, or oneDNN's."""
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((4, 8), (8, 8), (8,)))
    found = forward_mode_without_grad(lambda x: kernels.linear(x, weight, bias), x)
    torch.testing.assert_close(found, tangent_at(x) @ weight.T)
