"""Every balancing method on gradients that are zero, equal, opposed, tiny, huge or not finite."""

import pytest
import torch
from torch import Tensor

from kernels import balancing, draw_order, gram
from kernels.surgery import pcgrad_weights_reference

from .test_balancing import METHODS as EACH
from .test_balancing import Method, gradients

METHODS: dict[str, Method] = EACH | {
    "cagrad of radius 0": lambda matrix: balancing.cagrad(matrix, 0.0),
    "cagrad of radius 1": lambda matrix: balancing.cagrad(matrix, 1.0),
    "nash_mtl without a limit": lambda matrix: balancing.nash_mtl(matrix, 0.0),
    "nash_mtl with a limit": lambda matrix: balancing.nash_mtl(matrix, 1.0),
    "fairgrad of alpha 0": lambda matrix: balancing.fairgrad(matrix, 0.0),
    "fairgrad of alpha 0.5": lambda matrix: balancing.fairgrad(matrix, 0.5),
    "aligned_mtl by the median": lambda matrix: balancing.aligned_mtl(matrix, scale_mode="median"),
    "aligned_mtl by rmse": lambda matrix: balancing.aligned_mtl(matrix, scale_mode="rmse"),
    "the reference of pcgrad": lambda matrix: pcgrad_weights_reference(
        matrix, draw_order(len(matrix), 3), False, False
    ),
}
DTYPES = [torch.float32, torch.float64]


def cases(num_tasks: int) -> dict[str, Tensor]:
    """Task gradients in float64."""
    rows = gradients(num_tasks, 3)
    one_zero, opposed = rows.clone(), rows[:1].repeat(num_tasks, 1)
    one_zero[-1] = 0
    opposed[1::2] *= -1
    return {
        "usual": rows,
        "all zero": torch.zeros_like(rows),
        "one zero": one_zero,
        "equal": rows[:1].repeat(num_tasks, 1),
        "opposed": opposed,
        "rank 1": rows[:1] * torch.arange(1, num_tasks + 1)[:, None],
        "1e-30": 1e-30 * rows,
        "1e-22": 1e-22 * rows,
        "1e-19": 1e-19 * rows,
        "1e15": 1e15 * rows,
        "1e30": 1e30 * rows,
        "one of 1e15": torch.cat([1e15 * rows[:1], rows[1:]]),
    }


def weigh(method: str, num_tasks: int, rows: Tensor) -> Tensor:
    if method.startswith("krum") and num_tasks < 3:
        pytest.skip("Krum needs three gradients")
    return METHODS[method](gram(rows))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_weights_are_finite_where_the_gram_matrix_is(method: str, num_tasks: int) -> None:
    for dtype in DTYPES:
        for name, rows in cases(num_tasks).items():
            weights = weigh(method, num_tasks, rows.to(dtype))
            assert weights.shape == (num_tasks,)
            if name == "1e30" and dtype == torch.float32:  # whose squares are infinite
                assert weights.isnan().all(), name
            else:
                assert weights.isfinite().all(), (name, dtype)


@pytest.mark.parametrize("method", [name for name in METHODS if "a limit" not in name])
@pytest.mark.parametrize("num_tasks", [1, 2, 4])
def test_weights_do_not_depend_on_the_gradients_scale(method: str, num_tasks: int) -> None:
    usual, *scaled = (
        weigh(method, num_tasks, cases(num_tasks)[name])
        for name in ("usual", "1e-30", "1e-22", "1e-19", "1e15", "1e30")
    )
    for weights in scaled:
        torch.testing.assert_close(weights, usual, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_whose_squares_float32_takes_for_zero_count_as_zero(method: str) -> None:
    few, none = (weigh(method, 4, cases(4)[name].float()) for name in ("1e-30", "all zero"))
    assert torch.equal(few, none)


@pytest.mark.parametrize("method", METHODS)
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


def test_gradvac_does_not_remember_a_gradient_that_is_not_finite() -> None:
    rows, order = gradients(4, 3), draw_order(4, 3)
    targets = balancing.gradvac(gram(rows), order, torch.zeros(4, 4)).targets
    assert targets.count_nonzero() > 0
    rows[1, 5] = torch.nan
    step = balancing.gradvac(gram(rows), order, targets)
    assert step.weights.isnan().all()
    assert torch.equal(step.targets, targets)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_auxiliary_pcgrad_of_any_dtype(dtype: torch.dtype) -> None:
    """Also where the sum over the auxiliaries is too large for the Gram matrix's dtype."""
    zeros = balancing.auxiliary_pcgrad(torch.zeros(3, 3, dtype=dtype))
    torch.testing.assert_close(zeros, torch.tensor([1, 0.3, 0.3], dtype=dtype))
    rows = gradients(3, 3)
    rows[1] = 2 * rows[2] - rows[0]  # a conflict
    exact = rows @ rows.T
    exact[:2, :2] += 20 * torch.eye(2)
    large = (exact * torch.finfo(dtype).max / exact.max() / 1.01).to(dtype)
    expected = balancing.auxiliary_pcgrad(large.double() / large.double().max(), 0, 50.0)
    found = balancing.auxiliary_pcgrad(large, 0, 50.0)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_krum_does_not_choose_around_a_gradient_that_is_not_finite() -> None:
    rows = gradients(5, 3)
    rows[0, 0] = torch.nan
    assert balancing.krum(gram(rows), num_byzantine=1).isnan().all()
