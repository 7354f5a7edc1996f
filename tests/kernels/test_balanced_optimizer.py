"""Any method around any optimizer: the combination, and what gets weights of its own."""

import pytest
import torch
from torch import nn

from kernels import BalancedOptimizer, PCGrad, balancing
from kernels.surgery import draw_order

from .algorithm1 import algorithm1
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


@pytest.mark.parametrize("extent", ["group", "tensor"])
def test_surgery_by_group_and_by_tensor(extent: str) -> None:
    model = Tasks()
    groups = [
        {"params": list(model.trunk.parameters())},
        {"params": [model.temperature, *model.pair.parameters(), *model.heads.parameters()]},
        {"params": [model.frozen, model.empty, model.unreached]},
    ]
    optimizer = PCGrad(torch.optim.SGD(groups, lr=0.1), "sum", extent=extent)
    order = draw_order(3, 5)
    rows = task_gradients(model)
    optimizer.pc_backward(model.losses(), order)

    columns: dict[object, list[torch.Tensor]] = {}
    end = 0
    for parameter in (p for p in model.parameters() if p.requires_grad):
        begin, end = end, end + parameter.numel()
        number = next(n for n, g in enumerate(groups) if any(p is parameter for p in g["params"]))
        key = number if extent == "group" else id(parameter)
        columns.setdefault(key, []).append(torch.arange(begin, end))
    exact = torch.zeros(end, dtype=torch.float64)
    for own in map(torch.cat, columns.values()):
        exact[own] = algorithm1(rows[:, own], order)
    torch.testing.assert_close(written_gradients(model), exact, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(optimizer.gram, rows @ rows.T)
    assert model.unreached.grad is None
    assert model.frozen.grad is None


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
    exact = algorithm1(rows, order)
    torch.testing.assert_close(single.grad.double(), exact[:5], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(double.grad, exact[5:], rtol=1e-6, atol=1e-6)


def test_bad_extent() -> None:
    with pytest.raises(ValueError, match="extent must be 'model', 'group' or 'tensor'"):
        BalancedOptimizer(
            torch.optim.SGD(Tasks().parameters(), lr=0.1), balancing.mgda, extent="layer"
        )
