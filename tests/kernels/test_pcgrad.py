"""The optimizer wrapper: which gradient every parameter gets."""

import copy

import pytest
import torch
from torch import Tensor, nn

from kernels import PCGrad, balancing
from kernels.balancing.pcgrad import draw_order, pcgrad_weights

from .pcgrad_reference import reference_pcgrad
from .published_pcgrad import published_update


class Tasks(nn.Module):
    """A shared trunk, a layer of tasks 0 and 1, a head for each of three tasks, odd parameters."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 5)
        self.pair = nn.Linear(5, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor(1.5))  # 0-dim
        self.empty = nn.Parameter(torch.zeros(0))
        self.unreached = nn.Parameter(torch.ones(4))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        self.to(dtype)

    def losses(self, seed: int = 1) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        losses = []
        for task, head in enumerate(self.heads):
            x = torch.randn(7, 6, generator=generator).to(self.trunk.weight)
            y = torch.randn(7, 1, generator=generator).to(x)
            hidden = torch.tanh(self.trunk(x))
            if task < 2:
                hidden = torch.tanh(self.pair(hidden))
            prediction = head(hidden) * self.temperature + self.empty.sum()
            losses.append((prediction - y).square().mean())
        return losses


def task_gradients(model: Tasks, seed: int = 1) -> Tensor:
    """``[3, P]`` of all parameters that require a gradient, zero where one is not reached."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for loss in model.losses(seed):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        parts = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(parameters, gradients, strict=True)
        ]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows)


def written_gradients(model: nn.Module) -> Tensor:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def test_sum_is_algorithm_1() -> None:
    model = Tasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), reduction="sum")
    order = draw_order(3, 5)
    optimizer.pc_backward(model.losses(), order)
    exact = reference_pcgrad(task_gradients(model), order)
    torch.testing.assert_close(written_gradients(model), exact, rtol=1e-10, atol=1e-12)


def test_mean_is_over_the_tasks_that_reach_a_parameter() -> None:
    total, mean = Tasks(), Tasks()
    order = draw_order(3, 5)
    for model, reduction in ((total, "sum"), (mean, "mean")):
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), reduction)
        optimizer.pc_backward(model.losses(), order)
    for part, tasks in (("trunk", 3), ("pair", 2), ("heads", 1)):
        for ours, summed in zip(
            mean.get_submodule(part).parameters(),
            total.get_submodule(part).parameters(),
            strict=True,
        ):
            torch.testing.assert_close(ours.grad, summed.grad / tasks)
    torch.testing.assert_close(mean.temperature.grad, total.temperature.grad / 3)


def test_what_no_task_reaches_is_left_alone() -> None:
    model = Tasks()
    before = copy.deepcopy(model.state_dict())
    optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward(model.losses())
        optimizer.step()
    assert model.unreached.grad is None
    assert model.frozen.grad is None
    assert model.empty.grad.shape == (0,)
    assert model.temperature.grad.shape == ()
    for name in ("unreached", "frozen"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert not torch.equal(model.trunk.weight, before["trunk.weight"])


def test_published_update_is_replayed() -> None:
    model = Tasks()
    for seed in range(20):
        order = draw_order(3, seed)
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum", include_self=True)
        optimizer.zero_grad()
        optimizer.pc_backward(model.losses(seed), order)
        expected = published_update(task_gradients(model, seed), order)
        torch.testing.assert_close(written_gradients(model), expected, rtol=1e-10, atol=1e-12)


def test_accumulation_projects_the_summed_task_gradients() -> None:
    model = Tasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "sum")
    order = draw_order(3, 5)
    for seed in (1, 2):
        optimizer.pc_backward(model.losses(seed), order)
    exact = reference_pcgrad(task_gradients(model, 1) + task_gradients(model, 2), order)
    torch.testing.assert_close(written_gradients(model), exact, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="losses must be 3 until zero_grad, not 2"):
        optimizer.pc_backward(model.losses()[:2])
    optimizer.zero_grad()
    optimizer.pc_backward(model.losses(3)[:2])  # another number of tasks


def test_graphs_are_freed_once_no_later_loss_needs_them() -> None:
    model = Tasks()
    losses = model.losses()
    PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)).pc_backward(losses)
    for loss in losses:
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    # losses on one graph: kept for as long as needed
    x = torch.randn(3, 6, dtype=torch.float64)
    hidden = torch.tanh(model.trunk(x))
    PCGrad(torch.optim.SGD(model.parameters(), lr=0.1)).pc_backward(
        [model.heads[0](hidden).exp().sum(), model.heads[1](hidden).exp().sum()]
    )


def test_same_seed_same_training() -> None:
    def train(seed: int, steps: int, resume_at: int | None = None) -> Tensor:
        model = Tasks(torch.float32)
        optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=0.1), seed=seed)
        for step in range(steps):
            if step == resume_at:
                state = optimizer.state_dict()
                optimizer = PCGrad(torch.optim.AdamW(model.parameters(), lr=0.1), seed=seed)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            optimizer.pc_backward(model.losses(step))
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(train(1, 6), train(1, 6))
    assert torch.equal(train(1, 6), train(1, 6, resume_at=3))


def test_it_is_an_optimizer_for_schedulers() -> None:
    model = Tasks()
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=1.0))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.pc_backward(model.losses())
    optimizer.step()
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.optimizer.param_groups) == 2
    optimizer.load_state_dict(optimizer.optimizer.state_dict())  # as saved without the wrapper


def test_grad_scaler() -> None:
    order = draw_order(3, 5)
    results = []
    for scale in (1.0, 1024.0):
        model = Tasks(torch.float32)
        optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer.pc_backward([scaler.scale(loss) for loss in model.losses()], order)
        scaler.step(optimizer)
        scaler.update()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])

    before = [p.clone() for p in model.parameters()]
    losses = model.losses()
    losses[1] = losses[1] * torch.inf
    optimizer.zero_grad()
    optimizer.pc_backward([scaler.scale(loss) for loss in losses], order)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_mixed_dtypes_and_sparse_gradients() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 4, sparse=True)
    low = nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
    parameters = [table.weight, low]
    optimizer = PCGrad(torch.optim.SGD(parameters, lr=0.1), "sum")
    ids = torch.tensor([1, 1, 7])
    losses = [(table(ids) * low.float()).sum(), -(table(ids[:2]) * low.float()).square().sum()]
    rows = [
        [
            g.to_dense() if g.is_sparse else g
            for g in torch.autograd.grad(loss, parameters, retain_graph=True)
        ]
        for loss in losses
    ]
    order = draw_order(2, 1)
    optimizer.pc_backward(losses, order)
    flat = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in rows])
    exact = reference_pcgrad(flat, order)
    torch.testing.assert_close(
        table.weight.grad.flatten().double(), exact[:36], rtol=1e-5, atol=1e-5
    )
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.double(), exact[36:], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1e-23, 0.0])
def test_tiny_gradients_stay_finite(dtype: torch.dtype, size: float) -> None:
    # The published class divides by a squared norm that underflows here.
    weights = nn.Parameter(torch.zeros(3, dtype=dtype))
    directions = torch.tensor([[1.0, 0, 0], [-1.0, 1.0, 0]], dtype=dtype) * size
    optimizer = PCGrad(torch.optim.SGD([weights], lr=0.1), "sum")
    optimizer.pc_backward([(weights * direction).sum() for direction in directions])
    assert torch.isfinite(weights.grad).all()


def test_bad_arguments() -> None:
    model = Tasks()
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', not 'total'"):
        PCGrad(torch.optim.SGD(model.parameters(), lr=0.1), "total")
    optimizer = PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    for bad in ([], [torch.ones(2, requires_grad=True)]):
        with pytest.raises(ValueError, match="losses must be one or more scalars"):
            optimizer.pc_backward(bad)
    frozen = PCGrad(torch.optim.SGD([model.frozen], lr=0.1))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        frozen.pc_backward(model.losses())


NO_PERMUTATIONS = ([[0, 0], [1, 1]], [[0, 1], [1, 1]], [[0, 2], [1, 0]], [[0, -1], [1, 0]])


@pytest.mark.parametrize("rows", NO_PERMUTATIONS)
def test_an_order_that_leaves_tasks_out_is_refused(rows: list[list[int]]) -> None:
    order, parameter = torch.tensor(rows), torch.nn.Parameter(torch.randn(3))
    matrix = torch.eye(2)
    optimizer = PCGrad(torch.optim.SGD([parameter], lr=0.1))
    for call in (
        lambda: optimizer.pc_backward([parameter.sum(), -parameter.square().sum()], order),
        lambda: pcgrad_weights(matrix, order),
        lambda: pcgrad_weights(matrix.double(), order, include_self=True),
        lambda: torch.ops.superbert.pcgrad_weights(matrix, order, True, False),
        lambda: balancing.gradvac(matrix, order, torch.zeros(2, 2)),
    ):
        with pytest.raises(ValueError, match=r"^order"):
            call()
    assert parameter.grad is None


def test_an_order_of_another_size_or_kind_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = PCGrad(torch.optim.SGD([parameter], lr=0.1))
    losses = [parameter.sum(), -parameter.square().sum()]
    with pytest.raises(ValueError, match=r"^order: expected \[2, 2\], got \[3, 3\]"):
        optimizer.pc_backward(losses, draw_order(3, 1))
    losses = [parameter.sum(), -parameter.square().sum()]
    with pytest.raises(TypeError, match=r"^order: expected a tensor \[K, K\], got list"):
        optimizer.pc_backward(losses, [[0, 1], [1, 0]])
