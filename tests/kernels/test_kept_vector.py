"""Combined gradients get the memory of the step before, unless somebody still refers to it."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import PCGrad, TaskGradients
from kernels.balancing.pcgrad import draw_order
from kernels.integrations.kept_vector import KeptVector

from .test_balanced_gradients import Joined
from .test_pcgrad import Tasks, written_gradients

ORDER = draw_order(3, 5)


def wrapped(model: nn.Module) -> PCGrad:
    return PCGrad(torch.optim.AdamW(model.parameters(), lr=0.01))


def memory_of(model: nn.Module) -> set[int]:
    """Addresses of the gradients' memory; asks for no storage, which would leave a trace."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {torch._C._storage_address(gradient) for gradient in gradients}


def step(model: Tasks, optimizer: PCGrad, seed: int = 1) -> None:
    optimizer.zero_grad()
    optimizer.pc_backward(model.losses(seed), ORDER)
    optimizer.step()


def test_a_loop_writes_into_the_same_memory() -> None:
    model = Tasks()
    optimizer = wrapped(model)
    step(model, optimizer)
    (memory,) = memory_of(model)
    for _ in range(3):
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())
        step(model, optimizer)
        assert memory_of(model) == {memory}


def test_a_loop_with_task_gradients_writes_into_the_same_memory() -> None:
    model = Joined()
    collector = TaskGradients(model, 2)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    seen = set()
    for _ in range(3):
        losses = model.losses(collector)
        optimizer.zero_grad()
        optimizer.pc_backward(losses)
        optimizer.step()
        seen |= memory_of(model)
    assert len(seen) == 1


def _saved_by_autograd(gradient: Tensor) -> Tensor:
    return gradient.detach().requires_grad_().square().sum()


HOLD: dict[str, Callable[[Tensor], Any]] = {
    "the gradient": lambda gradient: gradient,
    "a view": lambda gradient: gradient[1:],
    "detached": lambda gradient: gradient.detach(),
    "data": lambda gradient: gradient.data[:1],
    "an array": lambda gradient: gradient.numpy(),
    "a memoryview": lambda gradient: memoryview(gradient.numpy()),
    "a storage": lambda gradient: gradient.untyped_storage(),
    "DLPack": lambda gradient: torch.utils.dlpack.to_dlpack(gradient),
    "a graph": _saved_by_autograd,
}


@pytest.mark.parametrize("how", HOLD)
def test_what_somebody_holds_is_not_overwritten(how: str) -> None:
    model = Tasks()
    optimizer = wrapped(model)
    step(model, optimizer)
    step(model, optimizer)
    (memory,) = memory_of(model)
    held = HOLD[how](model.trunk.bias.grad)
    for seed in (2, 3):
        step(model, optimizer, seed)
        assert memory not in memory_of(model)
    (memory,) = memory_of(model)
    del held
    step(model, optimizer)
    assert memory_of(model) == {memory}


def test_a_gradient_that_is_held_keeps_its_values() -> None:
    model = Tasks()
    optimizer = wrapped(model)
    held, expected = [], []
    for seed in range(4):
        step(model, optimizer, seed)
        held.append(model.trunk.weight.grad)
        expected.append(model.trunk.weight.grad.clone())
    assert all(map(torch.equal, held, expected))
    assert len({gradient.data_ptr() for gradient in held}) == 4


def test_who_only_looked_at_a_storage_holds_nothing() -> None:
    model = Tasks()
    optimizer = wrapped(model)
    seen = set()
    for _ in range(3):
        step(model, optimizer)
        assert model.trunk.bias.grad.untyped_storage().nbytes() > 0
        seen |= memory_of(model)
    assert len(seen) == 1


def test_memory_shared_with_other_processes_is_left_alone() -> None:
    model = Tasks()
    optimizer = wrapped(model)
    step(model, optimizer)
    (memory,) = memory_of(model)
    model.trunk.bias.grad.share_memory_()
    step(model, optimizer)
    assert memory not in memory_of(model)


def test_memory_that_somebody_freed_is_not_written() -> None:
    model, plain = Tasks(), Tasks()
    optimizer = wrapped(model)
    optimizer.pc_backward(model.losses(), ORDER)
    model.trunk.bias.grad.untyped_storage().resize_(0)
    for own, tried in ((model, optimizer), (plain, wrapped(plain))):
        tried.zero_grad()
        tried.pc_backward(own.losses(2), ORDER)
    assert torch.equal(written_gradients(model), written_gradients(plain))


# ---- the same numbers as with new memory ---------------------------------------------------------


def new_memory(_: KeptVector, like: Tensor, size: int) -> Tensor:
    return like.new_full((size,), torch.nan)


def _accumulate(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    optimizer.pc_backward(model.losses(seed + 10), ORDER)


def _clip(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)


def _foreign(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    sum(p.square().sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.pc_backward(model.losses(seed + 10), ORDER)


def _one_replaced(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    model.pair.bias.grad = torch.ones_like(model.pair.bias)
    optimizer.pc_backward(model.losses(seed + 10), ORDER)


def _narrower(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    if seed == 1:
        optimizer.zero_grad()
        model.float()
        optimizer.state.clear()
        optimizer.pc_backward(model.losses(seed), ORDER)


def _unfreeze(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    if seed == 1:
        model.frozen.requires_grad_()
        optimizer.pc_backward([*model.losses(seed)[:2], model.frozen.square().sum()], ORDER)


def _state(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def _copy(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    twin, own = copy.deepcopy((model, optimizer))
    step(twin, own, seed)
    assert not memory_of(twin) & memory_of(model)
    pickle.loads(pickle.dumps(optimizer))


def _leave_some(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    gradient = model.trunk.bias.grad
    optimizer.zero_grad()
    model.trunk.bias.grad = gradient
    optimizer.pc_backward(model.losses(seed + 10), ORDER)


def _in_place(model: Tasks, optimizer: PCGrad, seed: int) -> None:
    optimizer.zero_grad(set_to_none=False)
    optimizer.pc_backward(model.losses(seed + 10), ORDER)


AFTER = (_accumulate, _clip, _foreign, _one_replaced, _narrower, _unfreeze, _state, _copy)
AFTER = (*AFTER, _leave_some, _in_place)


def _train(after: Callable[[Tasks, PCGrad, int], None], granularity: Any) -> dict[str, Tensor]:
    model = Tasks()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    optimizer = PCGrad(base, granularity=granularity)
    for seed in range(4):
        optimizer.zero_grad()
        optimizer.pc_backward(model.losses(seed), ORDER)
        after(model, optimizer, seed)
        optimizer.step()
    return model.state_dict()


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("granularity", ["model", "tensor"])
@pytest.mark.parametrize("after", AFTER)
def test_training_has_the_bits_of_new_memory(
    monkeypatch: pytest.MonkeyPatch, after: Callable[..., None], granularity: str
) -> None:
    kept = _train(after, granularity)
    monkeypatch.setattr(KeptVector, "take", new_memory)
    new = _train(after, granularity)
    assert all(torch.equal(kept[name], new[name]) for name in new)


def _train_two() -> dict[str, Tensor]:
    """A trunk and its heads, each with an optimizer of its own, which the losses go through."""
    model = Tasks()
    parts = [[*model.trunk.parameters(), *model.pair.parameters()], [*model.heads.parameters()]]
    optimizers = [PCGrad(torch.optim.SGD(part, lr=0.1)) for part in parts]
    for seed in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for optimizer in optimizers:
            optimizer.pc_backward(model.losses(seed), ORDER)
        assert len(memory_of(model)) > 1
        for optimizer in optimizers:
            optimizer.step()
    return model.state_dict()


def test_two_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _train_two()
    monkeypatch.setattr(KeptVector, "take", new_memory)
    new = _train_two()
    assert all(torch.equal(kept[name], new[name]) for name in new)


def test_a_compiled_step_lets_the_memory_go() -> None:
    model, plain = Tasks(), Tasks()
    optimizers = [
        PCGrad(torch.optim.SGD(m.parameters(), 0.1, foreach=True)) for m in (model, plain)
    ]
    compiled = torch.compile(lambda: optimizers[0].step(), backend="eager")
    seen = []
    for seed in range(4):
        for own, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.pc_backward(own.losses(seed), ORDER)
        compiled()
        optimizers[1].step()
        seen.append(memory_of(model))
    assert seen[-1] == seen[-2]
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=0)
