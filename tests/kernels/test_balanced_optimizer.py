"""Any method around any optimizer: the combination, and what gets weights of its own."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels import BalancedOptimizer, PCGrad, TaskGradients, balancing
from kernels.balancing.pcgrad import draw_order

from .pcgrad_reference import reference_pcgrad
from .test_pcgrad import Tasks, task_gradients, written_gradients


@pytest.mark.parametrize("method", [balancing.cagrad, balancing.upgrad, balancing.mgda])
def test_a_method_of_the_gram_matrix(method) -> None:
    model = Tasks()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method)
    rows = task_gradients(model)
    optimizer.backward(model.losses())
    weights = method(rows @ rows.T)
    torch.testing.assert_close(optimizer.weights, weights[None])
    torch.testing.assert_close(written_gradients(model), weights @ rows)


def test_a_torchjd_weighting_is_a_method() -> None:
    torchjd = pytest.importorskip("torchjd.aggregation")
    model = Tasks()
    optimizer = BalancedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), torchjd.AlignedMTLWeighting()
    )
    rows = task_gradients(model)
    optimizer.backward(model.losses())
    torch.testing.assert_close(written_gradients(model), torchjd.AlignedMTL()(rows))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            balancing.gradvac,
            r"gradvac cannot be called .* \(missing a required argument: 'order'\)",
        ),
        (lambda: None, "<lambda> cannot be called .* .too many positional arguments"),
        ("cagrad", "expected a function of the Gram matrix, got 'cagrad'"),
        (None, "expected a function of the Gram matrix, got None"),
    ],
)
def test_what_is_no_method_is_refused_at_once(method, message: str) -> None:
    with pytest.raises(TypeError, match=f"^method: {message}"):
        BalancedOptimizer(torch.optim.SGD(Tasks().parameters(), lr=0.1), method)


@pytest.mark.parametrize(
    ("method", "got"),
    [
        (lambda gram: gram, r"\[3, 3\]"),
        (lambda gram: gram.diagonal()[:2], r"\[2\]"),
        (lambda gram: gram.sum(), r"\[\]"),
        (lambda gram: gram.diagonal().tolist(), "list"),
        (lambda gram: None, "NoneType"),
        (torch.nn.Identity, "Identity"),  # a class where an object of it was meant
    ],
)
def test_what_a_method_returns_is_checked(method, got: str) -> None:
    model = Tasks()
    optimizer = BalancedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), method)
    with pytest.raises(TypeError, match=rf"^method: expected a tensor \[3\] .*, got {got}$"):
        optimizer.backward(model.losses())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("granularity", ["group", "tensor"])
def test_surgery_by_group_and_by_tensor(granularity: str) -> None:
    model = Tasks()
    groups = [
        {"params": list(model.trunk.parameters())},
        {"params": [model.temperature, *model.pair.parameters(), *model.heads.parameters()]},
        {"params": [model.frozen, model.empty, model.unreached]},
    ]
    optimizer = PCGrad(torch.optim.SGD(groups, lr=0.1), "sum", granularity=granularity)
    order = draw_order(3, 5)
    rows = task_gradients(model)
    optimizer.pc_backward(model.losses(), order)

    columns: dict[object, list[torch.Tensor]] = {}
    end = 0
    for parameter in (p for p in model.parameters() if p.requires_grad):
        begin, end = end, end + parameter.numel()
        number = next(n for n, g in enumerate(groups) if any(p is parameter for p in g["params"]))
        key = number if granularity == "group" else id(parameter)
        columns.setdefault(key, []).append(torch.arange(begin, end))
    exact = torch.zeros(end, dtype=torch.float64)
    for own in map(torch.cat, columns.values()):
        exact[own] = reference_pcgrad(rows[:, own], order)
    torch.testing.assert_close(written_gradients(model), exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.gram, rows @ rows.T)
    assert model.unreached.grad is None
    assert model.frozen.grad is None


@pytest.mark.parametrize("frozen", ["trunk", "heads", "bias"])
def test_groups_with_nothing_to_train(frozen: str) -> None:
    """Weights belong to their group, wherever those lie that are frozen as a whole or in part."""
    model = nn.ModuleDict({"trunk": nn.Linear(6, 5), "heads": nn.Linear(5, 3)}).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    groups = [{"params": list(module.parameters())} for module in model.values()]
    optimizer = PCGrad(torch.optim.SGD(groups, lr=0.1), "sum", granularity="group")
    order = draw_order(3, 5)
    outputs = model["heads"](model["trunk"](torch.randn(7, 6).double()))
    losses = list((outputs.square().mean(0) * torch.tensor([1, -1, 1])).unbind())
    for group in groups:
        parameters = [p for p in group["params"] if p.requires_grad]
        if not parameters:
            continue
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, None, True)])
                for loss in losses
            ]
        )
        group["exact"] = reference_pcgrad(rows, order)
    optimizer.pc_backward(losses, order)
    for group in groups:
        if "exact" in group:
            written = torch.cat([p.grad.flatten() for p in group["params"] if p.requires_grad])
            torch.testing.assert_close(written, group["exact"])


def test_grad_mode_and_shape_of_the_losses_are_as_in_backward() -> None:
    model = Tasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    order = draw_order(3, 5)
    optimizer.pc_backward(model.losses(), order)
    exact = written_gradients(model)
    optimizer.zero_grad()
    losses = [
        loss.reshape(shape) for loss, shape in zip(model.losses(), [(), 1, (1, 1)], strict=True)
    ]
    with torch.no_grad():
        optimizer.pc_backward(losses, order)
    torch.testing.assert_close(written_gradients(model), exact)


def test_groups_of_two_dtypes_are_balanced_together() -> None:
    torch.manual_seed(0)
    single, double = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(4).double())
    optimizer = PCGrad(torch.optim.SGD([single, double], lr=0.1), "sum")
    directions = torch.randn(2, 9, dtype=torch.float64)
    directions[1] -= 1.5 * directions[0]
    order = draw_order(2, 1)
    optimizer.pc_backward(
        [(single.double() @ row[:5]) + (double @ row[5:]) for row in directions], order
    )
    rows = torch.cat([directions[:, :5].float().double(), directions[:, 5:]], dim=1)
    exact = reference_pcgrad(rows, order)
    torch.testing.assert_close(single.grad.double(), exact[:5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(double.grad, exact[5:], rtol=1e-6, atol=1e-6)


def test_bad_extent() -> None:
    with pytest.raises(ValueError, match="granularity must be 'model', 'group' or 'tensor'"):
        BalancedOptimizer(
            torch.optim.SGD(Tasks().parameters(), lr=0.1), balancing.mgda, granularity="layer"
        )


FUSED = {
    "AdamW": torch.optim.AdamW,
    "Adagrad": torch.optim.Adagrad,
    "SGD": torch.optim.SGD,
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("collects", [False, True])
def test_gradients_have_the_strides_of_their_parameters(name: str, collects: bool) -> None:
    def trained(transposed: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 2)
        if transposed:
            model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
        collector = TaskGradients(model, 2) if collects else None
        fused = FUSED[name](model.parameters(), lr=0.1, fused=True)
        optimizer = PCGrad(fused, task_gradients=collector)
        with collector.batch([2, 2]) if collector is not None else nullcontext():
            first, second = model(torch.randn(4, 6)).split(2)
        optimizer.pc_backward([first.square().sum(), -second.sum()], torch.tensor([[0, 1]] * 2))
        optimizer.step()
        assert model.weight.grad.stride() == model.weight.stride()
        return model.weight.detach()

    torch.testing.assert_close(trained(transposed=True), trained(transposed=False))


def test_reentrant_checkpoints_are_refused() -> None:
    """They hide the parameters inside, which would silently not be trained."""
    model = Tasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    for reentrant in (True, False):
        hidden = checkpoint(model.trunk, x, use_reentrant=reentrant)
        losses = [hidden.sum(), hidden.square().sum()]
        if reentrant:
            with pytest.raises(ValueError, match="use_reentrant=False"):
                optimizer.pc_backward(losses)
        else:
            optimizer.pc_backward(losses)
    assert model.trunk.weight.grad is not None


@pytest.mark.parametrize("collects", [False, True])
def test_parameters_that_were_replaced_are_an_error(collects: bool) -> None:
    model = nn.Linear(6, 2)
    collector = TaskGradients(model, 2) if collects else None
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), task_gradients=collector)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with collector.batch([2, 2]) if collector is not None else nullcontext():
        first, second = model(torch.randn(4, 6)).split(2)
    with pytest.raises(ValueError, match="none depends on a parameter of the optimizer"):
        optimizer.pc_backward([first.sum(), second.sum()])


def test_a_model_that_was_cast_needs_other_task_gradients() -> None:
    model = nn.Linear(6, 2)
    collector = TaskGradients(model, 2)
    model.double()
    for block in (collector.batch([2, 2]), collector.task(0)):
        with pytest.raises(ValueError, match=r"^weight: now torch.float64 on cpu, but"), block:
            pass
    assert not TaskGradients(model, 2).rows.any()


def test_parameters_of_another_optimizer_get_the_gradient_of_the_sum() -> None:
    model, hooked = Tasks(), []
    shared = [*model.trunk.parameters(), *model.pair.parameters()]
    others = [model.temperature, *model.heads.parameters()]
    optimizer = PCGrad(torch.optim.SGD(shared, lr=0.1), "sum")
    order = draw_order(3, 5)
    sums = torch.autograd.grad(sum(model.losses()), others)
    parts = [torch.autograd.grad(loss, shared, allow_unused=True) for loss in model.losses()]
    rows = torch.stack(
        [
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs])
            for pairs in (zip(shared, part, strict=True) for part in parts)
        ]
    )
    model.temperature.register_post_accumulate_grad_hook(hooked.append)
    for call in (1, 2):
        optimizer.pc_backward(model.losses(), order)
        for parameter, exact in zip(others, sums, strict=True):
            torch.testing.assert_close(parameter.grad, call * exact)
        written = torch.cat([p.grad.flatten() for p in shared])
        torch.testing.assert_close(written, reference_pcgrad(call * rows, order))
    assert len(hooked) == 2
    assert model.unreached.grad is None
