"""More task gradients than fit into a tile: a row for each example, say."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kernels import BalancedOptimizer, PCGrad, balancing, draw_order, gram, update_guard
from kernels.balancing.pcgrad import draw_order_reference, pcgrad_weights, pcgrad_weights_reference
from kernels.surgery.surgery import (
    combine,
    combine_adamw_,
    combine_adamw_reference_,
    combine_reference,
    gram_reference,
)

from .balancing.methods import METHODS, gradients, update
from .conftest import exact_projector
from .pcgrad_reference import reference_pcgrad
from .test_surgery import DTYPES, task_rows
from .tolerance import assert_within_twice

TASKS = [63, 65, 100, 128, 129, 300]
# Nothing, less than a vector, and around a block of 2048 columns.
COLUMNS = [0, 17, 2047, 2049]


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_tasks", TASKS)
def test_gram_and_combine(num_tasks: int, dtype: torch.dtype) -> None:
    for columns in COLUMNS if num_tasks < 300 else COLUMNS[1:3]:
        rows = task_rows(num_tasks, columns, dtype)
        matrix = gram(rows)
        weights = torch.linspace(-1.5, 2.0, num_tasks, dtype=matrix.dtype)
        combined = combine(rows, weights)
        exact, exact_sum = rows.double() @ rows.double().T, weights.double() @ rows.double()
        if dtype == torch.float64:
            torch.testing.assert_close(matrix, exact, rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(combined, exact_sum, rtol=1e-12, atol=1e-14)
        else:
            assert_within_twice(matrix, gram_reference(rows, [0, columns])[0], exact)
            assert_within_twice(combined, combine_reference(rows, weights), exact_sum)
        assert torch.equal(matrix, matrix.T)


@pytest.mark.usefixtures("vector_unit")
def test_products_do_not_depend_on_the_other_rows() -> None:
    rows = task_rows(130, 5000, torch.float32)
    whole, offsets = gram(rows), [3, 3, 2500, 5000]
    for first, last in pairwise((0, 1, 40, 64, 65, 128, 130)):
        assert torch.equal(gram(rows[first:last]), whole[first:last, first:last])
    by_segment = gram(rows, offsets)
    for segment, (begin, end) in zip(by_segment, pairwise(offsets), strict=True):
        assert torch.equal(segment, gram(rows[:, begin:end]))


def test_same_bits_for_any_number_of_threads() -> None:
    rows, threads = task_rows(130, 40_001, torch.float32), torch.get_num_threads()
    matrix = gram(rows).double()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((gram(rows), balancing.upgrad(matrix)))
    finally:
        torch.set_num_threads(threads)
    for products, weights in results:
        assert torch.equal(products, results[0][0])
        assert torch.equal(weights, results[0][1])


def test_gram_and_combine_can_be_differentiated() -> None:
    rows = task_rows(66, 3, torch.float64).requires_grad_()
    weights = torch.linspace(-1, 1, 66, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(gram, rows, fast_mode=True)
    torch.autograd.gradcheck(combine, (rows, weights), fast_mode=True)


@pytest.mark.parametrize("num_tasks", [65, 200])
def test_pcgrad_is_algorithm_1(num_tasks: int) -> None:
    rows, order = gradients(num_tasks, 1, columns=num_tasks + 3), draw_order(num_tasks, 5, 7)
    assert torch.equal(order, draw_order_reference(torch.tensor(5), torch.tensor(7), num_tasks))
    weights = pcgrad_weights(gram(rows), order)
    torch.testing.assert_close(
        weights, pcgrad_weights_reference(gram(rows), order, False, False), rtol=1e-9, atol=1e-9
    )
    if num_tasks == 65:
        exact = reference_pcgrad(rows, order)
        torch.testing.assert_close(combine(rows, weights), exact, rtol=1e-9, atol=1e-9)


def test_a_fused_step() -> None:
    rows, settings = task_rows(130, 2049, torch.bfloat16), (0.9, 0.999, 1e-8, 0.1)
    matrix = gram(rows)
    weights = torch.linspace(-1, 1, 130)
    guard = update_guard(matrix, weights, max_norm=0.5)
    torch.testing.assert_close(guard.norm, combine(rows.float(), weights).norm())
    scalars = {"lr": torch.tensor(1e-3), "step": torch.tensor(2)}
    states = [[torch.linspace(-1, 1, 2049, dtype=dtype)] for dtype in (torch.float32,) * 2]
    states.append([states[0][0].double()])
    for state in states:
        state += [torch.zeros_like(state[0]), torch.zeros_like(state[0])]
    ours, plain, exact = states
    combine_adamw_(rows, weights, *ours, **scalars, weight_decay=0.1, scale=guard.scale)
    for state in (plain, exact):
        dtype = state[0].dtype
        combine_adamw_reference_(
            *(rows.to(dtype), weights.to(dtype), *state, None),
            *(*scalars.values(), guard.scale, None, *settings),
        )
    for mine, reference, true in zip(ours, plain, exact, strict=True):
        assert_within_twice(mine, reference, true)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("columns", [140, 30])
def test_methods_end_in_finite_weights(name: str, columns: int) -> None:
    rows = gradients(65, 3, columns)
    result = update(METHODS[name], rows)
    assert torch.isfinite(result).all()
    if name in ("upgrad", "dual_projection", "mgda"):
        assert (rows @ result).min() > -1e-6


ORACLES: dict[str, tuple[Callable[..., Callable[[Tensor], Tensor]], float]] = {
    "upgrad": (lambda jd: jd.UPGradWeighting(projector=exact_projector()), 1e-6),
    "dual_projection": (lambda jd: jd.DualProjWeighting(projector=exact_projector()), 1e-6),
    "imtl_g": (lambda jd: jd.IMTLGWeighting(), 1e-9),
    "aligned_mtl": (lambda jd: jd.AlignedMTLWeighting(), 1e-9),
    "krum": (lambda jd: jd.KrumWeighting(0, 1), 1e-9),
    "cagrad": (lambda jd: jd.CAGradWeighting(0.5), 1e-3),
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("num_tasks", [65, 200])
def test_agrees_with_torchjd(torchjd, name: str, num_tasks: int) -> None:
    make_oracle, tolerance = ORACLES[name]
    rows = gradients(num_tasks, 1, columns=2 * num_tasks)
    expected = make_oracle(torchjd)(rows @ rows.T) @ rows
    error = (update(METHODS[name], rows) - expected).norm() / expected.norm()
    assert error < tolerance


@pytest.mark.parametrize("columns", [150, 40])
def test_mgda_is_the_shortest_convex_combination(columns: int) -> None:
    rows = gradients(100, 2, columns)
    weights = balancing.mgda(rows @ rows.T)
    shortest = weights @ rows
    assert (weights >= 0).all()
    assert (rows @ shortest).min() > shortest.square().sum() - 1e-6 * columns


@pytest.mark.parametrize("wrapper", [PCGrad, BalancedOptimizer])
def test_a_row_for_each_example(wrapper: type) -> None:
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(5, 1), torch.randn(70, 5)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = list(model(inputs).square().flatten())
    if wrapper is PCGrad:
        optimizer = PCGrad(inner, reduction="sum")
        optimizer.zero_grad()
        optimizer.pc_backward(losses)
    else:
        optimizer = BalancedOptimizer(inner, balancing.sum)
        optimizer.zero_grad()
        optimizer.backward(losses)
        expected = torch.autograd.grad(model(inputs).square().sum(), model.parameters())
        for parameter, gradient in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
    assert torch.isfinite(model.weight.grad).all()
    assert model.weight.grad.norm() > 0
