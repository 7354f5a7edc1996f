"""Task gradients of several calls, gradients that were there before, and tasks without a loss."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from kernels import BalancedOptimizer, PCGrad, TaskGradients, balancing
from kernels.balancing.pcgrad import draw_order

from ..device_waits import no_wait_for_the_device
from .pcgrad_reference import reference_pcgrad
from .test_pcgrad import Tasks, task_gradients, written_gradients

ORDER = draw_order(3, 5)


@pytest.fixture
def model() -> Tasks:
    return Tasks()


@pytest.fixture
def optimizer(model: Tasks) -> PCGrad:
    return PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum")


def regularize(model: Tasks) -> Tensor:
    return sum(p.square().sum() for p in model.parameters() if p.requires_grad)


def assert_close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)


# ---- clearing ------------------------------------------------------------------------------------

CLEAR: dict[str, Callable[[Tasks, PCGrad], None]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "wrapped": lambda model, optimizer: optimizer.optimizer.zero_grad(),
    "wrapped, in place": lambda model, optimizer: optimizer.optimizer.zero_grad(set_to_none=False),
    "foreach": lambda model, optimizer: torch._foreach_zero_(
        [p.grad for p in model.parameters() if p.grad is not None]
    ),
    "part": lambda model, optimizer: (
        [p.grad.zero_() for p in model.parameters() if p.grad is not None and p.dim() > 0]
        and setattr(model.temperature, "grad", None)
    ),
}


@pytest.mark.parametrize("how", CLEAR)
@pytest.mark.parametrize("regularized", [False, True])
@pytest.mark.parametrize("step", [False, True])
def test_cleared_gradients_start_afresh(
    model: Tasks, optimizer: PCGrad, how: str, regularized: bool, step: bool
) -> None:
    for seed in range(4):
        if seed:
            CLEAR[how](model, optimizer)
        expected = reference_pcgrad(task_gradients(model, seed), ORDER)
        if regularized:
            regularize(model).backward()
            expected = expected + torch.cat(
                [2 * p.detach().flatten() for p in model.parameters() if p.requires_grad]
            )
        optimizer.pc_backward(model.losses(seed), ORDER)
        assert_close(written_gradients(model), expected)
        if step:
            optimizer.step()


@pytest.mark.parametrize("change", ["clip", "replace", "backward"])
def test_changed_gradients_are_added_to(model: Tasks, optimizer: PCGrad, change: str) -> None:
    optimizer.pc_backward(model.losses(1), ORDER)
    if change == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    elif change == "backward":
        regularize(model).backward()
    else:
        model.trunk.weight.grad = model.trunk.weight.grad / 2
    before = written_gradients(model)
    optimizer.pc_backward(model.losses(2), ORDER)
    combined = reference_pcgrad(task_gradients(model, 2), ORDER)
    assert_close(written_gradients(model), before + combined)


def test_a_step_clears_nothing(model: Tasks, optimizer: PCGrad) -> None:
    rows = task_gradients(model, 1)
    optimizer.pc_backward(model.losses(1), ORDER)
    optimizer.step()
    rows += task_gradients(model, 2)
    optimizer.pc_backward(model.losses(2), ORDER)
    assert_close(written_gradients(model), reference_pcgrad(rows, ORDER))


def test_what_is_unfrozen_between_two_calls_is_trained(model: Tasks, optimizer: PCGrad) -> None:
    model.trunk.requires_grad_(False)
    optimizer.pc_backward(model.losses(1), ORDER)
    model.trunk.requires_grad_(True)
    before = written_gradients(model)
    optimizer.pc_backward(model.losses(2), ORDER)
    combined = reference_pcgrad(task_gradients(model, 2), ORDER)
    assert_close(written_gradients(model), before + combined)


def test_a_failed_call_leaves_nothing_behind(model: Tasks, optimizer: PCGrad) -> None:
    losses = model.losses()
    losses[2].backward()  # frees its graph
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.pc_backward(losses, ORDER)
    optimizer.pc_backward(model.losses(), ORDER)
    assert_close(written_gradients(model), reference_pcgrad(task_gradients(model), ORDER))


# ---- gradients of other origin -------------------------------------------------------------------


def test_gradients_that_stood_there_are_kept_over_accumulation(
    model: Tasks, optimizer: PCGrad
) -> None:
    regularize(model).backward()
    before = written_gradients(model)
    for seed in (1, 2):
        optimizer.pc_backward(model.losses(seed), ORDER)
    rows = task_gradients(model, 1) + task_gradients(model, 2)
    assert_close(written_gradients(model), before + reference_pcgrad(rows, ORDER))
    assert_close(model.unreached.grad, 2 * model.unreached.detach())


def test_a_gradient_that_came_between_two_calls_is_kept(model: Tasks, optimizer: PCGrad) -> None:
    last = model.heads[2].bias
    losses = model.losses()
    optimizer.pc_backward([*losses[:2], None], ORDER)
    assert last.grad is None
    last.grad = torch.ones_like(last)  # nothing that was written is touched
    optimizer.pc_backward([*model.losses(2)[:2], losses[2]], ORDER)
    rows = task_gradients(model, 1)
    rows[:2] += task_gradients(model, 2)[:2]
    combined = reference_pcgrad(rows, ORDER)
    written = written_gradients(model)
    last.grad -= 1
    assert_close(written_gradients(model), combined)
    assert not torch.equal(written, combined)


def test_a_sparse_gradient_that_stood_there() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = PCGrad(torch.optim.SGD(table.parameters(), lr=0.1), "sum")
    table(torch.tensor([1, 1])).sum().backward()
    optimizer.pc_backward([table(torch.tensor([k])).sum() for k in range(2)])
    assert table.weight.grad[:, 0].tolist() == [1, 3, 0, 0, 0]


# ---- hooks of parameters -------------------------------------------------------------------------


def test_hooks_are_called_as_in_backward(model: Tasks, optimizer: PCGrad) -> None:
    seen: list[Tensor] = []
    posted: list[Tensor] = []
    bias = model.trunk.bias
    bias.register_hook(seen.append)
    bias.register_hook(lambda gradient: 2 * gradient)
    bias.register_post_accumulate_grad_hook(lambda p: posted.append(p.grad.clone()))
    model.unreached.register_post_accumulate_grad_hook(lambda p: posted.append(p))
    rows = task_gradients(model)  # through the hooks, too
    seen.clear()
    optimizer.pc_backward(model.losses(), ORDER)
    assert len(seen) == 3
    assert_close(written_gradients(model), reference_pcgrad(rows, ORDER))
    assert len(posted) == 1
    assert_close(posted[0], bias.grad)


def test_an_optimizer_in_hooks(model: Tasks, optimizer: PCGrad) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in trained}

    def step(parameter: Tensor) -> None:
        inner[parameter].step()
        parameter.grad = None

    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(step)
    before = nn.utils.parameters_to_vector(trained).detach()
    for seed in (1, 2):
        before = before - 0.1 * reference_pcgrad(task_gradients(model, seed), ORDER)
        optimizer.pc_backward(model.losses(seed), ORDER)
        assert_close(nn.utils.parameters_to_vector(trained).detach(), before)


# ---- tasks without a loss ------------------------------------------------------------------------

ABSENT = {"None": None, "0.0": 0.0, "0": 0, "zeros": torch.zeros(()), "ones": torch.ones(1)}


@pytest.mark.parametrize("absent", ABSENT)
@pytest.mark.parametrize("task", [0, 1, 2])
def test_a_task_without_a_loss(model: Tasks, absent: str, task: int) -> None:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "mean")
    losses: list[object] = list(model.losses())
    losses[task] = ABSENT[absent]
    optimizer.pc_backward(losses, ORDER)
    rows = task_gradients(model)
    rows[task] = 0
    assert_close(optimizer.gram, rows @ rows.T)
    assert model.heads[task].weight.grad is None  # weight decay leaves it alone
    reaching = {"trunk": 2, "pair": 2 if task == 2 else 1}
    summed = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    mean = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    losses = list(model.losses())
    losses[task] = ABSENT[absent]
    summed.pc_backward(losses, ORDER)
    assert_close(written_gradients(model), reference_pcgrad(rows, ORDER))
    for name, gradient in mean.items():
        divisor = reaching.get(name.split(".")[0], 2 if name == "temperature" else 1)
        assert_close(gradient * divisor, model.get_parameter(name).grad)


def test_a_task_that_comes_later_in_the_accumulation(model: Tasks, optimizer: PCGrad) -> None:
    optimizer.pc_backward([*model.losses(1)[:2], None], ORDER)
    optimizer.pc_backward([None, None, model.losses(1)[2]], ORDER)
    assert_close(written_gradients(model), reference_pcgrad(task_gradients(model), ORDER))


@pytest.mark.parametrize(
    "method",
    [
        "mgda",
        "cagrad",
        "upgrad",
        "dual_projection",
        "imtl_g",
        "aligned_mtl",
        "nash_mtl",
        "fairgrad",
        "config",
        "krum",
        "mean",
        "sum",
        "main_aux",
    ],
)
def test_every_method_takes_a_task_without_a_loss(model: Tasks, method: str) -> None:
    optimizer = BalancedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), getattr(balancing, method)
    )
    first, _, third = model.losses()
    optimizer.backward([first, None, third])
    assert torch.isfinite(optimizer.weights).all()
    assert written_gradients(model).any()
    rows = task_gradients(model)
    rows[1] = 0
    assert_close(written_gradients(model), optimizer.weights[0] @ rows)


def test_losses_by_name(model: Tasks) -> None:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", tasks=["a", "b", "c"])
    a, b, c = model.losses()
    optimizer.pc_backward({"c": c, "a": a, "b": b}, ORDER)
    rows = task_gradients(model)
    assert_close(written_gradients(model), reference_pcgrad(rows, ORDER))
    optimizer.zero_grad()
    for name, loss in zip("bca", (model.losses()[k] for k in (1, 2, 0)), strict=True):
        optimizer.pc_backward({name: loss}, ORDER)  # one by one
    assert_close(written_gradients(model), reference_pcgrad(rows, ORDER))
    optimizer.zero_grad()
    optimizer.pc_backward(model.losses(), ORDER)  # by position, too
    assert_close(written_gradients(model), reference_pcgrad(rows, ORDER))
    with pytest.raises(ValueError, match=r"expected 3, for \['a', 'b', 'c'\], got 2"):
        optimizer.pc_backward(model.losses()[:2])


def test_names_are_those_of_the_first_losses(model: Tasks, optimizer: PCGrad) -> None:
    optimizer.pc_backward(dict(zip("abc", model.losses(), strict=True)), ORDER)
    optimizer.zero_grad()
    optimizer.pc_backward({"b": model.losses()[1]}, ORDER)
    assert len(optimizer.gram) == 3
    with pytest.raises(ValueError, match=r"task 'd' is none of \['a', 'b', 'c'\].*tasks="):
        optimizer.pc_backward({"d": model.losses()[1]})
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="tasks: expected names, each once"):
            PCGrad(optimizer.optimizer, tasks=names)


def test_single_losses(model: Tasks, optimizer: PCGrad) -> None:
    first, second, _ = model.losses()
    optimizer.pc_backward([first])  # one task; nothing to project
    with pytest.raises(ValueError, match="one loss, and one before it since zero_grad"):
        optimizer.pc_backward([second])
    optimizer.zero_grad()
    optimizer.pc_backward([second])
    named = PCGrad(optimizer.optimizer, tasks=["only"])
    named.zero_grad()
    for seed in (1, 2):
        named.pc_backward({"only": model.losses(seed)[0]})
    rows = task_gradients(model, 1) + task_gradients(model, 2)
    assert_close(written_gradients(model), rows[0])


@pytest.mark.parametrize("losses", [[None, 1.0], {}, {"a": None}, [torch.ones(())]])
def test_no_loss_with_a_gradient(model: Tasks, optimizer: PCGrad, losses: object) -> None:
    with pytest.raises(ValueError, match=r"losses(:| must be)"):
        optimizer.pc_backward(losses)
    with torch.no_grad(), pytest.raises(ValueError, match=r"outside torch\.no_grad"):
        optimizer.pc_backward(model.losses())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "given",
    [
        tuple,
        iter,
        lambda losses: (loss for loss in losses),
        lambda losses: map(torch.Tensor.squeeze, losses),
        lambda losses: dict(enumerate(losses)).values(),
        torch.stack,
        torch.amp.GradScaler("cpu", enabled=False).scale,
    ],
    ids=["tuple", "iterator", "generator", "map", "values", "tensor", "scaler"],
)
@pytest.mark.parametrize("tasks", [None, ["a", "b", "c"]])
def test_losses_in_anything_that_has_an_order(
    model: Tasks, given: Callable[..., object], tasks: list[str] | None
) -> None:
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", tasks=tasks)
    optimizer.pc_backward(given(model.losses()), ORDER)
    assert_close(written_gradients(model), reference_pcgrad(task_gradients(model), ORDER))
    with pytest.raises(ValueError, match=r"losses must be 3|expected 3, for .*, got 2"):
        optimizer.pc_backward(given(model.losses()[:2]))
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"one or more scalars|expected 3, for .*, got 0"):
        optimizer.pc_backward(loss for loss in ())


def test_losses_without_an_order(model: Tasks, optimizer: PCGrad) -> None:
    losses = model.losses()
    for bad, got in (
        (losses[0], "a single tensor"),
        (set(losses), "a set"),
        (1.0, "a float"),
        (None, "a NoneType"),
    ):
        with pytest.raises(ValueError, match=f"^losses: expected one for each task, .* got {got}"):
            optimizer.pc_backward(bad)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_no_loss(model: Tasks, optimizer: PCGrad) -> None:
    good = model.losses()[0]
    for bad, got in ((torch.ones(2), r"\[2\]"), ("loss", "str")):
        with pytest.raises(ValueError, match=f"number 1 is {got}, counted from 0"):
            optimizer.pc_backward([good, bad])


# ---- drawn orders --------------------------------------------------------------------------------


def test_every_drawn_order_counts(model: Tasks, optimizer: PCGrad) -> None:
    optimizer.pc_backward(model.losses())
    optimizer.pc_backward(model.losses(), ORDER)
    optimizer.backward(model.losses())
    assert optimizer.state_dict()["param_groups"][0]["drawn_orders"] == 2


def test_state_dicts_of_before_and_of_the_wrapped_optimizer(
    model: Tasks, optimizer: PCGrad
) -> None:
    plain = torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    optimizer.load_state_dict(plain | {"pcgrad": {"draws": 7}})
    assert optimizer.param_groups[0]["drawn_orders"] == 7
    optimizer.load_state_dict(plain)
    assert optimizer.param_groups[0]["drawn_orders"] == 0
    optimizer.optimizer.load_state_dict(plain)
    optimizer.pc_backward(model.losses())
    assert optimizer.param_groups[0]["drawn_orders"] == 1
    torch.optim.SGD(model.parameters(), lr=0.1).load_state_dict(optimizer.state_dict())


# ---- one backward pass for all tasks -------------------------------------------------------------


class Joined(nn.Module):
    """A shared layer and a head for each of two tasks, on one batch of both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        self.double()

    def losses(self, collector: TaskGradients | None) -> list[Tensor]:
        x = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)
        if collector is None:
            hidden = self.shared(x).tanh()
            outputs = [
                head(part) for head, part in zip(self.heads, hidden.split([2, 3]), strict=True)
            ]
        else:
            with collector.batch([2, 3]):
                hidden = self.shared(x).tanh()
            outputs = []
            for task, part in enumerate(hidden.split([2, 3])):
                with collector.task(task):
                    outputs.append(self.heads[task](part))
        return [(output - 1).square().mean() for output in outputs]


@pytest.mark.parametrize("absent", [None, 0, 1])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_task_gradients_start_afresh(absent: int | None, set_to_none: bool) -> None:
    joined, single = Joined(), Joined()
    collector = TaskGradients(joined, 2)
    optimizers = [
        PCGrad(torch.optim.SGD(joined.parameters(), lr=0.1), task_gradients=collector),
        PCGrad(torch.optim.SGD(single.parameters(), lr=0.1)),
    ]
    order = draw_order(2, 0)
    for call in range(4):
        for model, optimizer in zip((joined, single), optimizers, strict=True):
            if call == 1:
                model.zero_grad(set_to_none)
            losses: list[Tensor | None] = list(model.losses(collector if model is joined else None))
            if call > 1:
                model.zero_grad(set_to_none)  # between forward and backward pass
            if absent is not None and call > 0:
                losses[absent] = None
            optimizer.pc_backward(losses, order)
        assert_close(written_gradients(joined), written_gradients(single))
        assert_close(optimizers[0].gram, optimizers[1].gram)


@pytest.mark.parametrize("call", [0, 1])
def test_losses_from_outside_a_batch_are_refused(call: int) -> None:
    model = Joined()
    collector = TaskGradients(model, 2)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    if call:
        optimizer.pc_backward(model.losses(collector))
        optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="got a gradient that belongs to no task"):
        optimizer.pc_backward(model.losses(None))
    model.zero_grad()
    optimizer.pc_backward(model.losses(collector), draw_order(2, 0))
    single = Joined()
    PCGrad(torch.optim.SGD(single.parameters(), lr=0.1)).pc_backward(
        single.losses(None), draw_order(2, 0)
    )
    assert_close(written_gradients(model), written_gradients(single))


def test_backward_passes_of_ones_own_are_in_the_rows() -> None:
    model, single = Joined(), Joined()
    collector = TaskGradients(model, 2)
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    order = draw_order(2, 0)
    for _ in range(2):
        optimizer.zero_grad()
        sum(model.losses(collector)).backward()
        optimizer.pc_backward(model.losses(collector), order)
    other = PCGrad(torch.optim.SGD(single.parameters(), lr=0.1))
    other.pc_backward([2 * loss for loss in single.losses(None)], order)
    assert_close(written_gradients(model), written_gradients(single))


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["model", "group", "tensor"])
def test_nothing_waits_for_the_device(granularity: str) -> None:
    model = Tasks(torch.float32).cuda()
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=0.1), granularity=granularity)
    for call in range(5):
        model.zero_grad(set_to_none=call % 2 == 0)
        first, *others = (loss.cuda() for loss in model.losses(call))
        with no_wait_for_the_device() if call else nullcontext():  # the first call sets up
            optimizer.pc_backward([first if call != 2 else None, *others])
            optimizer.step()


def test_task_gradients_are_an_object_of_that_class() -> None:
    optimizer = torch.optim.SGD(Joined().parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"^task_gradients: expected .*num_tasks\), got int$"):
        PCGrad(optimizer, task_gradients=2)  # type: ignore[arg-type]


def test_copies_with_task_gradients_are_refused() -> None:
    model = Joined()
    optimizer = PCGrad(
        torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=TaskGradients(model, 2)
    )
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
