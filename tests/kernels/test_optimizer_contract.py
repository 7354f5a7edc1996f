"""The contract of torch's optimizers, by its documentation and tests, held by the wrappers."""

import copy
import io
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)
from torch.optim.swa_utils import SWALR, AveragedModel

from kernels import BalancedOptimizer, PCGrad, balancing

Optimizer = torch.optim.Optimizer
BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1),
    "Adam with a tensor rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1)),
}
WRAPPERS: dict[str, Callable[[Optimizer], BalancedOptimizer]] = {
    "PCGrad": PCGrad,
    "Balanced": lambda optimizer: BalancedOptimizer(optimizer, balancing.upgrad),
}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Callable[..., Optimizer]:
    return BASES[request.param]


@pytest.fixture(params=WRAPPERS)
def wrap(request: pytest.FixtureRequest) -> Callable[[Optimizer], BalancedOptimizer]:
    return WRAPPERS[request.param]


@pytest.fixture
def optimizer(model: nn.Module, base: Any, wrap: Any) -> BalancedOptimizer:
    return wrap(base(model.parameters()))


def losses_of(model: nn.Module) -> list[Tensor]:
    x = torch.linspace(-1, 1, 12).view(4, 3)
    return list((model(x) - torch.tensor([1.0, -2.0])).square().mean(0))


def train(model: nn.Module, optimizer: BalancedOptimizer, steps: int = 1) -> list[float]:
    totals = []
    for _ in range(steps):
        losses = losses_of(model)
        optimizer.zero_grad()
        optimizer.backward(losses)
        optimizer.step()
        totals.append(sum(losses).item())
    return totals


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=0)


# ---- copies --------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_trains_on_like_the_original(
    model: nn.Module, optimizer: BalancedOptimizer, how: str
) -> None:
    train(model, optimizer, 2)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # replaces `step` of the instance
    both = (model, optimizer)
    twin, copied = copy.deepcopy(both) if how == "deepcopy" else pickle.loads(pickle.dumps(both))
    public = {name for name in vars(optimizer) if not name.startswith("_") and name != "step"}
    assert public <= set(vars(copied))
    assert repr(copied) == repr(optimizer)
    assert copied.param_groups[0]["params"][0] is next(twin.parameters())
    assert train(twin, copied, 2) == train(model, optimizer, 2)
    assert_same(values(twin), values(model))
    assert_same(copied.state_dict(), optimizer.state_dict())


def test_a_copy_leaves_other_instances_alone(model: nn.Module, base: Any, wrap: Any) -> None:
    first, other = wrap(base(model.parameters())), wrap(base(model.parameters()))
    copy.deepcopy(first)
    train(model, other)
    train(model, first)
    train(model, wrap(base(model.parameters())))


def test_a_copy_between_backward_and_step_has_no_gradients(
    model: nn.Module, optimizer: BalancedOptimizer
) -> None:
    optimizer.backward(losses_of(model))
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.gram is None
    assert train(twin, copied) == train(model, optimizer)


# ---- hooks of state dicts; those of steps are in test_optimizer_step_hooks.py --------------------


def test_state_dict_hooks(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    train(model, optimizer)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda of: calls.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda of: calls.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(lambda of, state: state | {"extra": of is optimizer})
    optimizer.register_state_dict_post_hook(lambda of, state: calls.append("post"))
    state = optimizer.state_dict()
    assert state["extra"]
    assert calls == ["first", "pre", "post"]

    def halve(of: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
        groups = [group | {"lr": group["lr"] / 2} for group in loaded["param_groups"]]
        return loaded | {"param_groups": groups}

    optimizer.register_load_state_dict_pre_hook(halve)
    optimizer.register_load_state_dict_pre_hook(lambda of, loaded: calls.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda of: calls.append("loaded"))
    optimizer.load_state_dict(state)
    assert calls[3:] == ["load", "loaded"]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    assert float(state["param_groups"][0]["lr"]) == pytest.approx(0.1)


# ---- state and parameter groups ------------------------------------------------------------------


def test_state_goes_through_a_file(
    model: nn.Module, optimizer: BalancedOptimizer, base: Any, wrap: Any
) -> None:
    train(model, optimizer, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(model)
    restored = wrap(base(twin.parameters()))
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert_same(restored.state_dict(), optimizer.state_dict())
    assert train(twin, restored, 2) == train(model, optimizer, 2)


def test_views_of_the_wrapped_optimizer(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    train(model, optimizer)
    inner = optimizer.optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.state
    assert optimizer.defaults is inner.defaults
    optimizer.load_state_dict(optimizer.state_dict())  # replaces them
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert repr(optimizer).startswith(f"{type(optimizer).__name__} (\nParameter Group 0\n")


def test_groups_and_names_of_parameters(model: nn.Module, base: Any, wrap: Any) -> None:
    named = list(model.named_parameters())
    optimizer = wrap(base(named[:2]))
    optimizer.add_param_group({"params": named[2:], "lr": 0.0})
    assert "weight_decay" in optimizer.param_groups[1]
    before = values(model)
    train(model, optimizer, 2)
    for old, new in zip(before[:2], values(model)[:2], strict=True):
        assert not torch.equal(old, new)
    assert_same(before[2:], values(model)[2:])
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == [name for name, _ in named]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [named[0]]})


def test_a_group_added_between_two_calls_is_trained(model: nn.Module, base: Any, wrap: Any) -> None:
    parameters = list(model.parameters())
    optimizer = wrap(base(parameters[:2]))
    optimizer.backward(losses_of(model))
    optimizer.add_param_group({"params": parameters[2:]})
    optimizer.backward(losses_of(model))
    assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(model: nn.Module, optimizer: BalancedOptimizer, set_to_none: bool) -> None:
    optimizer.backward(losses_of(model))
    optimizer.zero_grad(set_to_none)
    for parameter in model.parameters():
        assert parameter.grad is None if set_to_none else not parameter.grad.any()
    before = values(model)
    optimizer.load_state_dict(optimizer.state_dict())
    if set_to_none:
        optimizer.step()  # without gradients nothing happens
        assert_same(values(model), before)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: LambdaLR(o, lambda step: 0.9**step),
        lambda o: StepLR(o, step_size=2),
        lambda o: CosineAnnealingLR(o, 10),
        lambda o: ReduceLROnPlateau(o, patience=0),
        lambda o: OneCycleLR(o, max_lr=0.1, total_steps=20, cycle_momentum=False),
        lambda o: SWALR(o, swa_lr=0.05),
    ],
    ids=["lambda", "step", "cosine", "plateau", "one cycle", "swa"],
)
@pytest.mark.parametrize("inside", [False, True], ids=["wrapper", "wrapped"])
@pytest.mark.filterwarnings("error")
def test_schedulers(
    model: nn.Module, optimizer: BalancedOptimizer, schedule: Any, inside: bool
) -> None:
    # Warnings are errors: one says that the scheduler's step came before the optimizer's.
    scheduler = schedule(optimizer.optimizer if inside else optimizer)
    rates = []
    for _ in range(6):
        train(model, optimizer)
        scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert len(set(rates)) > 1


def test_a_scheduler_stepped_too_early_says_so(
    model: nn.Module, optimizer: BalancedOptimizer
) -> None:
    scheduler = StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_averaged_model(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    averaged = AveragedModel(model)
    seen = []
    for _ in range(3):
        train(model, optimizer)
        averaged.update_parameters(model)
        seen.append(values(model))
    mean = [torch.stack(parameter).mean(0) for parameter in zip(*seen, strict=True)]
    torch.testing.assert_close(values(averaged.module), mean)


# ---- step ----------------------------------------------------------------------------------------


def test_closures(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    twin, without = copy.deepcopy((model, optimizer))

    def closure() -> float:
        return train_backward(model, optimizer)

    totals = [optimizer.step(closure) for _ in range(3)]
    assert totals == train(twin, without, 3)
    assert_same(values(model), values(twin))


def train_backward(model: nn.Module, optimizer: BalancedOptimizer) -> float:
    losses = losses_of(model)
    optimizer.zero_grad()
    optimizer.backward(losses)
    return sum(losses).item()


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(model: nn.Module, wrap: Any, line_search: str | None) -> None:
    optimizer = wrap(torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn=line_search))
    calls = 0

    def closure() -> float:
        nonlocal calls
        calls += 1
        return train_backward(model, optimizer)

    with torch.no_grad():  # LBFGS calls closures with gradients enabled, whatever is outside
        totals = [float(optimizer.step(closure)) for _ in range(4)]
    assert calls > 4
    assert totals[-1] < totals[0] / 10


def test_a_compiled_step(model: nn.Module, wrap: Any) -> None:
    # By single tensors, torch 2.11 rounds a compiled step of SGD in another way.
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, foreach=True))
    twin, eager = copy.deepcopy((model, optimizer))
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for _ in range(2):
        train_backward(model, optimizer)
        compiled()
    train(twin, eager, 2)
    assert_same(values(model), values(twin))


@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(model: nn.Module, optimizer: BalancedOptimizer, clip: bool) -> None:
    twin, unscaled = copy.deepcopy((model, optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(scaler.scale(losses_of(model)))
        unscaled.zero_grad()
        unscaled.backward(losses_of(twin))
        if clip:
            scaler.unscale_(optimizer)
            for clipped in (model, twin):
                nn.utils.clip_grad_norm_(clipped.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        unscaled.step()
    torch.testing.assert_close(values(model), values(twin), rtol=1e-4, atol=1e-5)


def test_losses_go_down(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    totals = train(model, optimizer, 20)
    assert totals[-1] < totals[0] / 2
    assert all(b < a for a, b in pairwise(totals[:3]))


# ---- gradients that nothing balanced -------------------------------------------------------------


def test_a_closure_without_backward_is_an_error(
    model: nn.Module, optimizer: BalancedOptimizer
) -> None:
    def closure() -> float:
        optimizer.zero_grad()
        loss = sum(losses_of(model))
        loss.backward()
        return loss.item()

    before = values(model)
    with pytest.raises(RuntimeError, match=r"the closure made gradients without (pc_)?backward"):
        optimizer.step(closure)
    assert_same(values(model), before)
    # Beside what was balanced, gradients of any origin are welcome.
    train_backward(model, optimizer)
    optimizer.step(lambda: sum(losses_of(model)).backward())


def test_a_step_without_backward_warns(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    sum(losses_of(model)).backward()
    with pytest.warns(UserWarning, match=r"no gradient is of (pc_)?backward") as warnings:
        optimizer.step()
    assert warnings[0].filename == __file__
    optimizer.zero_grad()
    train(model, optimizer)


@pytest.mark.filterwarnings("error")
def test_steps_that_do_not_warn(model: nn.Module, optimizer: BalancedOptimizer) -> None:
    train(model, optimizer)
    optimizer.step()  # on the same gradients, as with any optimizer
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    optimizer.backward(losses_of(model))
    for parameter in model.parameters():
        parameter.grad = parameter.grad * 0.5
    optimizer.step()


def test_what_is_wrapped_has_to_be_an_optimizer(model: nn.Module, wrap: Any) -> None:
    with pytest.raises(TypeError, match="optimizer: expected a torch optimizer"):
        wrap(model.parameters())
