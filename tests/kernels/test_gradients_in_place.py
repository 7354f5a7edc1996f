"""An existing ``grad`` is added to in place, as autograd does: a view of a flat buffer stays one.

The views of one buffer share its count of writes, which tells whether task gradients add up.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import BalancedOptimizer, PCGrad, TaskGradients, balancing
from kernels.balancing.pcgrad import draw_order

from .pcgrad_reference import reference_pcgrad
from .test_balanced_gradients import Joined, assert_close, regularize
from .test_pcgrad import Tasks, task_gradients, written_gradients

ORDER = draw_order(3, 5)


def flatten(model: nn.Module, transposed: bool = False, fill: float = 0.0) -> Tensor:
    """Make every gradient a view of one buffer, which is returned."""
    trained = [p for p in model.parameters() if p.requires_grad]
    buffer = torch.full((sum(p.numel() for p in trained),), fill, dtype=trained[0].dtype)
    for parameter, part in zip(trained, buffer.split([p.numel() for p in trained]), strict=True):
        shape = parameter.shape[::-1] if transposed else parameter.shape
        view = part.view(shape)
        parameter.grad = view.permute(tuple(range(view.dim()))[::-1]) if transposed else view
    return buffer


def of_model(change: Callable[[Tasks], Any]) -> Callable[[Tasks, Tensor | None], Any]:
    return lambda model, buffer: change(model)


def clear_buffer(model: Tasks, buffer: Tensor | None) -> None:
    model.zero_grad(set_to_none=False) if buffer is None else buffer.zero_()


# Before the second and the third call.
BETWEEN: dict[str, Callable[[Tasks, Tensor | None], Any]] = {
    "nothing": of_model(lambda model: None),
    "reading": of_model(lambda model: nn.utils.get_total_norm([model.trunk.weight.grad])),
    "the buffer cleared": clear_buffer,
    "cleared in place": of_model(lambda model: model.zero_grad(set_to_none=False)),
    "one cleared": of_model(lambda model: model.trunk.bias.grad.zero_()),
    "clipped": of_model(lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3)),
    "added to": of_model(lambda model: regularize(model).backward()),
    "one replaced": of_model(
        lambda model: setattr(model.pair.bias, "grad", torch.ones(5).double())
    ),
    "one removed": of_model(lambda model: setattr(model.pair.bias, "grad", None)),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fill", [0.0, 0.5])
@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_a_flat_buffer_is_filled(
    between: str, transposed: bool, fill: float, granularity: Any
) -> None:
    """Gradients are those of a model whose gradients are tensors of their own."""
    flat, plain = Tasks(), Tasks()
    buffer = flatten(flat, transposed, fill)
    views = {name: p.grad for name, p in flat.named_parameters()}
    for parameter in plain.parameters():
        parameter.grad = torch.full_like(parameter, fill) if parameter.requires_grad else None
    optimizers = [
        PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), granularity=granularity)
        for model in (flat, plain)
    ]
    for call in range(3):
        for model, own, optimizer in zip((flat, plain), (buffer, None), optimizers, strict=True):
            if call:
                BETWEEN[between](model, own)
            optimizer.pc_backward(model.losses(call), ORDER)
            optimizer.step()
        assert_close(written_gradients(flat), written_gradients(plain))
        for name, parameter in flat.named_parameters():
            if name != "pair.bias" or not between.startswith("one re"):
                assert parameter.grad is views[name], name
    torch.testing.assert_close(flat.state_dict(), plain.state_dict())
    if not between.startswith("one re"):
        assert_close(buffer.sum(), written_gradients(flat).sum())


def test_accumulation_into_a_buffer_that_was_not_empty() -> None:
    model = Tasks()
    buffer = flatten(model, fill=0.25)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    rows = torch.zeros_like(task_gradients(model))
    for call in range(3):
        rows += task_gradients(model, call)
        optimizer.pc_backward(model.losses(call), ORDER)
        assert_close(buffer, 0.25 + reference_pcgrad(rows, ORDER))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_the_object_stays_over_accumulation(set_to_none: bool) -> None:
    """As in autograd: who holds `grad` sees what comes later."""
    model = Tasks()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), balancing.upgrad)
    optimizer.backward(model.losses(0))
    held = model.trunk.weight.grad
    optimizer.backward(model.losses(1))
    assert model.trunk.weight.grad is held
    optimizer.zero_grad(set_to_none)
    optimizer.backward(model.losses(1))
    assert (model.trunk.weight.grad is held) is not set_to_none


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_flat_buffer_with_one_backward_pass(one_pass: bool) -> None:
    model, plain = Joined(), Joined()
    buffer = flatten(model)
    collector = TaskGradients(model, 2) if one_pass else None
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    other = PCGrad(torch.optim.SGD(plain.parameters(), lr=0.1))
    order = draw_order(2, 0)
    for call in range(4):
        if call == 2:
            model.zero_grad(set_to_none=False)
            plain.zero_grad()
        optimizer.pc_backward(model.losses(collector), order)
        other.pc_backward(plain.losses(None), order)
        assert_close(buffer, written_gradients(plain))


def test_hooks_see_all_gradients_written_and_may_change_their_own() -> None:
    model = Tasks()
    buffer = flatten(model)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    seen: list[Tensor] = []
    model.trunk.weight.register_post_accumulate_grad_hook(lambda p: seen.append(buffer.clone()))
    rows = task_gradients(model, 0)
    optimizer.pc_backward(model.losses(0), ORDER)
    assert_close(seen[0], reference_pcgrad(rows, ORDER))
    optimizer.pc_backward(model.losses(0), ORDER)
    assert_close(buffer, reference_pcgrad(2 * rows, ORDER))  # the hook changed nothing: they add up
    model.trunk.bias.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(2))
    model.zero_grad(set_to_none=False)
    optimizer.pc_backward(model.losses(0), ORDER)
    before = buffer.clone()
    assert_close(
        model.trunk.bias.grad, 2 * reference_pcgrad(rows, ORDER)[35:40]
    )  # temperature 1, unreached 4, weight 30
    optimizer.pc_backward(model.losses(0), ORDER)  # it was changed: afresh
    model.trunk.bias.grad.div_(2)
    assert_close(buffer, before + reference_pcgrad(rows, ORDER))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_autograds(dtype: torch.dtype) -> None:
    """With one task, bit by bit: an existing gradient plus the new one."""
    first, second = (nn.Linear(6, 5).to(dtype) for _ in range(2))
    second.load_state_dict(first.state_dict())
    x = torch.randn(7, 6).to(dtype)
    buffer = flatten(second, fill=0.3)
    flatten(first, fill=0.3)
    first(x).square().sum().backward()
    optimizer = BalancedOptimizer(torch.optim.SGD(second.parameters(), lr=0.1), balancing.sum)
    optimizer.backward([second(x).square().sum()])
    assert torch.equal(buffer, torch.cat([p.grad.flatten() for p in first.parameters()]))


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_gradient_with_a_graph() -> None:
    """Of `create_graph`: what is added is no part of it, as in autograd."""
    parameter = nn.Parameter(torch.tensor([2.0]))
    (parameter**3).sum().backward(create_graph=True)
    held = parameter.grad
    PCGrad(torch.optim.SGD([parameter], lr=0.1)).pc_backward([5 * parameter.sum()])
    assert parameter.grad is held
    assert parameter.grad.item() == 12 + 5


def test_gradients_of_a_wider_dtype_stay() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((3,), 1 + 2**-12)
    held = parameter.grad
    optimizer = PCGrad(torch.optim.SGD([parameter], lr=0.1))
    for call in (1, 2):
        optimizer.pc_backward([(parameter * 3).sum(), None])
        assert parameter.grad is held
        assert held.tolist() == [1 + 2**-12 + 3 * call] * 3


def test_a_freed_gradient_is_refused() -> None:
    layer = nn.Linear(3, 2)
    optimizer = PCGrad(torch.optim.SGD(layer.parameters(), lr=0.1))
    for _ in range(2):
        assert layer.weight.grad is None
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad.untyped_storage().resize_(0)
        outputs = layer(torch.randn(4, 3)).square()
        with pytest.raises(ValueError, match=r"^grad: its storage holds 0 of 24 bytes"):
            optimizer.pc_backward([outputs[:2].sum(), outputs[2:].sum()])
        optimizer.zero_grad()
