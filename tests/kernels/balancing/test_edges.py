"""Every balancing method on gradients that are zero, equal, opposed, tiny, huge or not finite."""

import pytest
import torch
from torch import Tensor

from kernels import gram

from .methods import VARIANTS, edge_cases, gradients

DTYPES = [torch.float32, torch.float64]


def weigh(method: str, num_tasks: int, rows: Tensor) -> Tensor:
    if method.startswith("krum") and num_tasks < 3:
        pytest.skip("Krum needs three gradients")
    return VARIANTS[method](gram(rows))


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
def test_weights_are_finite_where_the_gram_matrix_is(method: str, num_tasks: int) -> None:
    for dtype in DTYPES:
        for name, rows in edge_cases(num_tasks).items():
            weights = weigh(method, num_tasks, rows.to(dtype))
            assert weights.shape == (num_tasks,)
            if name == "1e30" and dtype == torch.float32:  # whose squares are infinite
                assert weights.isnan().all(), name
            else:
                assert weights.isfinite().all(), (name, dtype)


@pytest.mark.parametrize("method", [name for name in VARIANTS if "a limit" not in name])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_weights_do_not_depend_on_the_gradients_scale(method: str, num_tasks: int) -> None:
    usual, *scaled = (
        weigh(method, num_tasks, edge_cases(num_tasks)[name])
        for name in ("usual", "1e-30", "1e-22", "1e-19", "1e15", "1e30")
    )
    for weights in scaled:
        torch.testing.assert_close(weights, usual, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", VARIANTS)
def test_gradients_whose_squares_float32_takes_for_zero_count_as_zero(method: str) -> None:
    few, none = (weigh(method, 4, edge_cases(4)[name].float()) for name in ("1e-30", "all zero"))
    assert torch.equal(few, none)


@pytest.mark.parametrize("method", VARIANTS)
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_a_gradient_that_is_not_finite_makes_all_weights_nan(method: str, num_tasks: int) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        for task in range(num_tasks):
            for dtype in DTYPES:
                rows = gradients(num_tasks, 3).to(dtype)
                rows[task, 5] = value
                weights = weigh(method, num_tasks, rows)
                assert weights.dtype == dtype
                assert weights.isnan().all(), (value, task)
    rows = torch.full((num_tasks, 12), torch.nan)
    assert weigh(method, num_tasks, rows).isnan().all()
