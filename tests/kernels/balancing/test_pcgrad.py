"""PCGrad's weights, and the orders of its projections."""

import pytest
import torch
from torch import Tensor

from kernels.balancing.pcgrad import (
    draw_order,
    draw_order_reference,
    pcgrad_weights,
    pcgrad_weights_reference,
)
from kernels.surgery.surgery import combine, gram

from ..pcgrad_reference import reference_pcgrad
from ..tolerance import assert_within_twice


def conflicting_rows(num_tasks: int, columns: int, seed: int = 0) -> Tensor:
    """Float64 gradients of which about half of the pairs are in conflict."""
    return torch.randn(
        num_tasks,
        columns,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4, 8, 17, 64])
def test_pcgrad_is_algorithm_1(num_tasks: int) -> None:
    for seed in range(5):
        # Few columns, so that conflicts are strong and a projection changes what comes after it.
        rows = conflicting_rows(num_tasks, num_tasks + 3, seed)
        order = draw_order(num_tasks, seed)
        exact = reference_pcgrad(rows, order)
        double = combine(rows, pcgrad_weights(gram(rows), order))
        torch.testing.assert_close(double, exact, rtol=0, atol=1e-10 * float(exact.abs().max()))


@pytest.mark.parametrize("num_tasks", [2, 3, 8])
def test_pcgrad_in_float32(num_tasks: int) -> None:
    results, plain, exact = [], [], []
    for seed in range(8):
        rows = conflicting_rows(num_tasks, 1000, seed).float()
        order = draw_order(num_tasks, seed)
        results.append(combine(rows, pcgrad_weights(gram(rows), order)))
        projected = rows.clone()  # Algorithm 1 as torch computes it in float32
        for i, others in enumerate(order.tolist()):
            for j in others:
                dot = projected[i] @ rows[j]
                if j != i and dot < 0:
                    projected[i] -= dot / (rows[j] @ rows[j]) * rows[j]
        plain.append(projected.sum(0))
        exact.append(reference_pcgrad(rows, order))
    assert_within_twice(torch.stack(results), torch.stack(plain), torch.stack(exact))


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 64])
def test_pcgrad_reference_is_the_operator(
    num_tasks: int, reduction: str, include_self: bool
) -> None:
    for seed in range(5):
        matrix = gram(conflicting_rows(num_tasks, num_tasks + 1, seed))
        order = draw_order(num_tasks, seed)
        result = pcgrad_weights(matrix, order, None, reduction, include_self)
        reference = pcgrad_weights_reference(matrix, order, reduction == "mean", include_self)
        torch.testing.assert_close(result, reference, rtol=1e-9, atol=1e-9)


def test_mean_is_the_sum_over_the_number_of_tasks() -> None:
    matrix, order = gram(conflicting_rows(4, 9)), draw_order(4, 3)
    total = pcgrad_weights(matrix, order)
    torch.testing.assert_close(pcgrad_weights(matrix, order, reduction="mean"), total / 4)


def test_including_itself_projects_a_turned_gradient_back() -> None:
    # g0 loses its part along g1 and then points against itself nowhere; with three tasks a gradient
    # can come to oppose what it was, and then the published code projects it by itself.
    found = 0
    for seed in range(200):
        matrix, order = gram(conflicting_rows(4, 3, seed)), draw_order(4, seed)
        without = pcgrad_weights(matrix, order)
        found += not torch.equal(without, pcgrad_weights(matrix, order, include_self=True))
    assert found > 0


def test_order_drawn_from_a_generator() -> None:
    matrix = gram(conflicting_rows(6, 7))
    results = [
        pcgrad_weights(matrix, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
    torch.manual_seed(11)
    first = pcgrad_weights(matrix)
    torch.manual_seed(11)
    assert torch.equal(first, pcgrad_weights(matrix))


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6, 64])
@pytest.mark.parametrize("seed", [0, 1, -5, 2**63 - 1, -(2**63)])
def test_draw_order_reference_is_the_operator(num_tasks: int, seed: int) -> None:
    for step in (0, 1, 2**40 + 3):
        order = draw_order(num_tasks, torch.tensor(seed), torch.tensor(step))
        reference = draw_order_reference(torch.tensor(seed), torch.tensor(step), num_tasks)
        assert torch.equal(order, reference)
        assert torch.equal(order.sort(1).values, torch.arange(num_tasks).repeat(num_tasks, 1))
        assert torch.equal(order, draw_order(num_tasks, seed, step))


def test_orders_are_uniform() -> None:
    # All 6 permutations of 3 tasks in each of the 3 rows: 4000 draws, each count is binomial with
    # deviation sqrt(4000 * 5) / 6 = 23.6; 6 deviations never happen in 18 counts.
    orders = torch.stack([draw_order(3, seed=99, step=step) for step in range(4000)])
    for row in range(3):
        codes = orders[:, row] @ torch.tensor([9, 3, 1])
        counts = codes.unique(return_counts=True)[1]
        assert len(counts) == 6
        assert ((counts - 4000 / 6).abs() < 6 * 23.6).all()


def test_bad_weights_arguments() -> None:
    matrix, order = torch.eye(3), draw_order(3, 1)
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', not 'total'"):
        pcgrad_weights(matrix, order, reduction="total")
    for bad in (torch.ones(3), torch.ones(3, 4), torch.eye(3).half(), torch.eye(0)):
        with pytest.raises(ValueError, match="gram must"):
            pcgrad_weights(bad, order)
    for bad in (order[:2], order.int(), order.T.repeat(1, 2)[:, ::2]):
        with pytest.raises(ValueError, match="order must be"):
            pcgrad_weights(matrix, bad)
    for bad in (order + 1, order - 1):
        with pytest.raises(ValueError, match=r"order must hold task ids 0 \.\. K-1"):
            pcgrad_weights(matrix, bad)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"num_tasks must be at least 1, not {bad}"):
            draw_order(bad, 1)
    with pytest.raises(ValueError, match="seed must be one int64"):
        draw_order(3, torch.tensor(1.0))
