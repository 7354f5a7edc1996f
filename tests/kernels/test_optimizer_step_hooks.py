"""Step hooks: each is called once for a step, in torch's order, whatever is wrapped."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from kernels import BalancedOptimizer, PCGrad, balancing

from .test_optimizer_contract import WRAPPERS, losses_of, train_backward

Optimizer = torch.optim.Optimizer
Calls = list[tuple[str, Optimizer]]
GLOBAL = {
    "global pre": torch_optimizer.register_optimizer_step_pre_hook,
    "global post": torch_optimizer.register_optimizer_step_post_hook,
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[Optimizer], BalancedOptimizer]:
    return WRAPPERS[request.param]


@contextmanager
def global_hooks(calls: Calls) -> Iterator[None]:
    handles = [register(noting(calls, name)) for name, register in GLOBAL.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def noting(calls: Calls, name: str) -> Callable[..., None]:
    return lambda optimizer, args, kwargs: calls.append((name, optimizer))


def hook_own(optimizer: Optimizer, calls: Calls, prefix: str = "") -> None:
    optimizer.register_step_pre_hook(noting(calls, prefix + "pre"))
    optimizer.register_step_post_hook(noting(calls, prefix + "post"))


# Each steps a wrapper, once.
STEPS: dict[str, Callable[[nn.Module, BalancedOptimizer], Any]] = {
    "plain": lambda model, optimizer: (train_backward(model, optimizer), optimizer.step()),
    "closure": lambda model, optimizer: optimizer.step(lambda: train_backward(model, optimizer)),
    "scaler": lambda model, optimizer: scaled(model, optimizer, torch.amp.GradScaler("cpu")),
    "unscaled by the user": lambda model, optimizer: scaled(
        model, optimizer, torch.amp.GradScaler("cpu"), unscale=True
    ),
}


def scaled(
    model: nn.Module, optimizer: Any, scaler: torch.amp.GradScaler, unscale: bool = False
) -> None:
    optimizer.backward(scaler.scale(losses_of(model)))
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


# LBFGS steps with a closure only.
@pytest.mark.parametrize(
    ("base", "how"), [(b, h) for b in BASES for h in STEPS if b != "LBFGS" or h == "closure"]
)
def test_hooks_are_called_once_and_in_order(
    model: nn.Module, wrap: Any, base: str, how: str
) -> None:
    optimizer = wrap(BASES[base](model.parameters()))
    inner, calls = optimizer.optimizer, []
    hook_own(optimizer, calls)
    hook_own(inner, calls, "inner ")
    of_one_step = [
        ("global pre", optimizer),
        ("pre", optimizer),
        ("inner pre", inner),
        ("inner post", inner),
        ("post", optimizer),
        ("global post", optimizer),
    ]
    with global_hooks(calls):
        for steps in (1, 2):
            STEPS[how](model, optimizer)
            assert calls == of_one_step * steps
    STEPS[how](model, optimizer)  # the global hooks are removed
    assert calls[12:] == of_one_step[1:-1]


@pytest.mark.parametrize("of_inner", [False, True])
def test_with_a_scheduler(model: nn.Module, wrap: Any, of_inner: bool) -> None:
    optimizer, calls = wrap(torch.optim.SGD(model.parameters(), lr=0.1)), []
    # Replaces the instance's `step`.
    torch.optim.lr_scheduler.StepLR(optimizer.optimizer if of_inner else optimizer, 1)
    with global_hooks(calls):
        STEPS["plain"](model, optimizer)
    assert calls == [("global pre", optimizer), ("global post", optimizer)]


def test_wrappers_of_wrappers(model: nn.Module, wrap: Any) -> None:
    inner = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), balancing.mean)
    optimizer, calls = wrap(inner), []
    hook_own(optimizer, calls)
    hook_own(inner, calls, "inner ")
    hook_own(inner.optimizer, calls, "innermost ")
    with global_hooks(calls), pytest.warns(UserWarning, match="no gradient is of backward"):
        STEPS["plain"](model, optimizer)
    names = [name for name, _ in calls]
    own = ["pre", "inner pre", "innermost pre", "innermost post", "inner post", "post"]
    assert names == ["global pre", *own, "global post"]
    assert calls[0][1] is calls[-1][1] is optimizer


@pytest.mark.parametrize("prepared_first", [False, True])
def test_with_accelerate(model: nn.Module, wrap: Any, prepared_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = surgery = wrap(accelerator.prepare(base)) if prepared_first else wrap(base)
    if not prepared_first:
        outer = accelerator.prepare(surgery)
    calls: Calls = []
    with global_hooks(calls):
        surgery.backward(losses_of(model))
        outer.step()
    assert calls == [("global pre", surgery), ("global post", surgery)]


def test_other_optimizers_are_not_passed_over(model: nn.Module, wrap: Any) -> None:
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    other, calls = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), []

    def closure() -> float:
        other.step()
        return train_backward(model, optimizer)

    with global_hooks(calls):
        optimizer.step(closure)
        assert [of for _, of in calls] == [optimizer, other, other, optimizer]
        optimizer.optimizer.step()  # by itself it is an optimizer like any other
        assert [of for _, of in calls[4:]] == [optimizer.optimizer] * 2
    other.step()
    assert len(calls) == 6


def test_hooks_that_come_and_go_within_a_step(model: nn.Module, wrap: Any) -> None:
    optimizer, calls = wrap(torch.optim.SGD(model.parameters(), lr=0.1)), []
    handles = [GLOBAL["global pre"](noting(calls, "first"))]

    def closure() -> float:
        handles.pop().remove()
        handles.append(GLOBAL["global post"](noting(calls, "second")))
        return train_backward(model, optimizer)

    optimizer.step(closure)
    handles.pop().remove()
    STEPS["plain"](model, optimizer)
    assert calls == [("first", optimizer), ("second", optimizer)]


def test_a_step_that_fails_passes_over_nothing_later(model: nn.Module, wrap: Any) -> None:
    optimizer, calls = wrap(torch.optim.SGD(model.parameters(), lr=0.1)), []
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    with global_hooks(calls):
        optimizer.optimizer.step()
    assert [of for _, of in calls] == [optimizer.optimizer] * 2


@pytest.mark.parametrize("is_global", [False, True])
def test_hooks_that_change_the_arguments(model: nn.Module, wrap: Any, is_global: bool) -> None:
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    register = GLOBAL["global pre"] if is_global else optimizer.register_step_pre_hook
    closures = [lambda: 3.0]

    def with_closure(of: Optimizer, args: Any, kwargs: Any) -> Any:
        return (of,), {"closure": closures[0]}

    handle = register(with_closure)
    try:
        optimizer.backward(losses_of(model))
        assert optimizer.step() == 3.0
    finally:
        handle.remove()
    assert optimizer.step() is None


@pytest.mark.parametrize("returned", [3, [1, 2], (1,), ((), {}, None), "no"])
@pytest.mark.parametrize("is_global", [False, True])
def test_what_a_pre_hook_may_return(
    model: nn.Module, wrap: Any, is_global: bool, returned: object
) -> None:
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
    register = GLOBAL["global pre"] if is_global else optimizer.register_step_pre_hook
    handle = register(lambda *_: returned)
    try:
        with pytest.raises(RuntimeError, match="must return None or a tuple of"):
            optimizer.step()
    finally:
        handle.remove()


def test_the_first_instance_of_either_class_is_hooked_once() -> None:
    """Torch wraps `step` of the class of the first instance: of a subclass, before its parent."""

    class First(PCGrad):
        pass

    parameter = nn.Parameter(torch.ones(1))
    calls: Calls = []
    with global_hooks(calls):
        for kind in (First, PCGrad):
            optimizer = kind(torch.optim.SGD([parameter], lr=0.1))
            optimizer.step()
            assert calls.pop() == ("global post", optimizer)
            assert calls.pop() == ("global pre", optimizer)
            assert not calls
