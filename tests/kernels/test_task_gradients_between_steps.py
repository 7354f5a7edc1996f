"""With task gradients, backward passes of the caller's own between one step and the next.

Once `pc_backward` or `step` has come they are as with any optimizer, whoever clears gradients;
from `batch` or `task` until then, a gradient that belongs to no task is an error.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import PCGrad, TaskGradients
from kernels.balancing.pcgrad import draw_order

from .test_balanced_gradients import Joined, assert_close
from .test_pcgrad import written_gradients

ORDER = draw_order(2, 0)
CLEAR: dict[str, Callable[[nn.Module, PCGrad], Any]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "wrapped": lambda model, optimizer: optimizer.optimizer.zero_grad(),
    "nobody": lambda model, optimizer: None,
}
# Where a regulariser's backward pass comes among the calls of a step.
WHERE = ("before all", "before each", "after all", "never")


def regularize(model: nn.Module) -> None:
    sum(p.square().sum() for p in model.parameters()).backward()


def wrapped(model: nn.Module, collector: TaskGradients | None) -> PCGrad:
    return PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("clip", [False, True])
def test_training_is_that_of_a_pass_for_each_task(
    where: str, clear: str, calls: int, clip: bool
) -> None:
    trained = []
    for one_pass in (True, False):
        model = Joined()
        collector = TaskGradients(model, 2) if one_pass else None
        optimizer = wrapped(model, collector)
        for _ in range(3):
            CLEAR[clear](model, optimizer)
            for call in range(calls):
                if where == "before each" or (where == "before all" and call == 0):
                    regularize(model)
                optimizer.pc_backward(model.losses(collector), ORDER)
            if where == "after all":
                regularize(model)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert_close(*trained)


@pytest.mark.parametrize("clear", CLEAR)
def test_losses_of_ones_own_after_a_step(clear: str) -> None:
    """An evaluation that differentiates, say; then training goes on as if it had not been."""
    model = Joined()
    collector = TaskGradients(model, 2)
    optimizer = wrapped(model, collector)
    optimizer.pc_backward(model.losses(collector), ORDER)
    optimizer.step()
    CLEAR[clear](model, optimizer)
    before = written_gradients(model)
    twin = copy.deepcopy(Joined())
    twin.load_state_dict(model.state_dict())
    sum(twin.losses(None)).backward()
    sum(model.losses(None)).backward()
    assert_close(written_gradients(model), before + written_gradients(twin))
    model.zero_grad()
    twin.zero_grad()
    optimizer.pc_backward(model.losses(collector), ORDER)
    wrapped(twin, None).pc_backward(twin.losses(None), ORDER)
    assert_close(written_gradients(model), written_gradients(twin))


def stray(model: Joined, collector: TaskGradients, optimizer: PCGrad) -> None:
    regularize(model)


def outside(model: Joined, collector: TaskGradients, optimizer: PCGrad) -> None:
    optimizer.pc_backward(model.losses(None), ORDER)


@pytest.mark.parametrize("clear", CLEAR)
@pytest.mark.parametrize("mistake", [stray, outside])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_while_task_gradients_are_collected_strays_are_an_error(
    clear: str, mistake: Callable[..., None], steps: int
) -> None:
    model = Joined()
    collector = TaskGradients(model, 2)
    optimizer = wrapped(model, collector)
    for _ in range(steps):
        optimizer.pc_backward(model.losses(collector), ORDER)
        optimizer.step()
        CLEAR[clear](model, optimizer)
    if mistake is stray or steps == 1:
        losses = model.losses(collector)
        assert len(losses) == 2
    with pytest.raises(RuntimeError, match="got a gradient that belongs to no task"):
        mistake(model, collector, optimizer)
    model.zero_grad()
    optimizer.pc_backward(model.losses(collector), ORDER)
    twin = Joined()
    twin.load_state_dict(model.state_dict())
    wrapped(twin, None).pc_backward(twin.losses(None), ORDER)
    assert_close(written_gradients(model), written_gradients(twin))
    regularize(model)  # combined: one's own again


def test_a_step_without_pc_backward_ends_the_collecting() -> None:
    model = Joined()
    collector = TaskGradients(model, 2)
    optimizer = wrapped(model, collector)
    model.losses(collector)
    optimizer.step()
    regularize(model)
    assert_close(
        written_gradients(model), 2 * nn.utils.parameters_to_vector(model.parameters()).detach()
    )


@pytest.mark.parametrize("clear", [name for name in CLEAR if name != "nobody"])
def test_backward_passes_into_the_rows_start_afresh_too(clear: str) -> None:
    """`backward` of joined losses adds to the rows; of a step that is over, nothing is left."""
    model, twin = Joined(), Joined()
    collector = TaskGradients(model, 2)
    optimizer, other = wrapped(model, collector), wrapped(twin, None)
    for _ in range(3):
        CLEAR[clear](model, optimizer)
        CLEAR[clear](twin, other)
        sum(model.losses(collector)).backward()
        optimizer.pc_backward(model.losses(collector), ORDER)
        other.pc_backward([2 * loss for loss in twin.losses(None)], ORDER)
        assert_close(written_gradients(model), written_gradients(twin))
        optimizer.step()
        other.step()


def test_an_optimizer_that_is_gone_leaves_the_rows_alone() -> None:
    model = Joined()
    collector = TaskGradients(model, 2)
    optimizer: PCGrad | None = wrapped(model, collector)
    assert optimizer is not None
    optimizer.pc_backward(model.losses(collector), ORDER)
    rows = collector.rows.clone()
    model.zero_grad()
    optimizer = None
    losses: list[Tensor] = model.losses(collector)
    assert torch.equal(collector.rows, rows)
    sum(losses).backward()
    assert_close(collector.rows, 2 * rows)
