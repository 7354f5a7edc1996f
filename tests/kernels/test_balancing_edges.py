"""Every balancing method on gradients that are zero, equal, opposed, tiny, huge or not finite."""

from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import balancing, draw_order, gram
from kernels.surgery.surgery import pcgrad_weights_reference

from .test_balancing import METHODS as EACH
from .test_balancing import Method, gradients

METHODS: dict[str, Method] = EACH | {
    "cagrad of radius 0": lambda matrix: balancing.cagrad(matrix, 0.0),
    "cagrad of radius 1": lambda matrix: balancing.cagrad(matrix, 1.0),
    "nash_mtl without a limit": lambda matrix: balancing.nash_mtl(matrix, 0.0),
    "nash_mtl with a limit": lambda matrix: balancing.nash_mtl(matrix, 1.0),
    "cagrad of radius 1e38": lambda matrix: balancing.cagrad(matrix, 1e38),
    "auxiliary_pcgrad of weight 0": lambda matrix: balancing.auxiliary_pcgrad(matrix, 0, 0.0),
    "auxiliary_pcgrad of weight 1e38": lambda matrix: balancing.auxiliary_pcgrad(matrix, 0, 1e38),
    **{
        f"fairgrad of alpha {alpha}": partial(balancing.fairgrad, alpha=alpha)
        for alpha in (1e-300, 1e-8, 1e-6, 1e-4, 0.01, 50.0, 1e300)
    },
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
    norms = torch.logspace(-15, 15, num_tasks, dtype=torch.float64)[:, None]
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
        "nearly opposed": opposed + 1e-6 * rows,
        "1e-15 to 1e15": norms * rows,
        "1e15 to 1e-15": norms.flip(0) * rows,
        "1e-15 to 1e15, equal": norms * rows[:1],
        "1e-15 to 1e15, opposed": norms * opposed,
        "one of 1e15": torch.cat([1e15 * rows[:1], rows[1:]]),
    }


def weigh(method: str, num_tasks: int, rows: Tensor) -> Tensor:
    if method.startswith("krum") and num_tasks < 3:
        pytest.skip("Krum needs three gradients")
    return METHODS[method](gram(rows))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8])
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


# ---- fairgrad ------------------------------------------------------------------------------------


def definite(rows: Tensor) -> Tensor:
    """What fairgrad solves for: G of norm 1, its diagonal larger by rounding errors."""
    matrix = rows @ rows.T
    matrix += torch.diag(len(rows) * torch.finfo(rows.dtype).eps * matrix.diagonal())
    return matrix / matrix.norm()


@pytest.mark.parametrize("alpha", [1e-300, 1e-8, 1e-6, 1e-4, 0.01, 0.1, 0.5, 1.0, 2.0])
def test_fairgrad_solves_its_equation(alpha: float) -> None:
    """``G c = c^(-1 / alpha)``: where a task's gain is more than rounding, and nowhere negative."""
    for seed in range(20):
        num_tasks = 2 + seed % 7
        rows = gradients(num_tasks, seed, columns=(12, 4, 2, 1)[seed % 4])
        if seed % 3 == 0:
            rows[0] = -2 * rows[1]
        if seed % 5 == 0:
            rows *= torch.logspace(-4, 4, num_tasks, dtype=torch.float64)[:, None]
        matrix = definite(rows)
        weights = balancing.fairgrad(rows @ rows.T, alpha)
        assert (weights > 0).all()
        gains, sizes = matrix @ weights, matrix.abs() @ weights
        assert (gains > -1e-12 * sizes).all()
        clear = gains > 1e-10 * sizes
        error = (weights.log() + alpha * gains.log())[clear].abs()
        rounded = 1e-9 if alpha >= 1e-8 else 1e-6  # a smaller one is taken for 1e-8
        assert (error <= 1e-4 * alpha + rounded).all(), (seed, error)


@pytest.mark.parametrize("alpha", [1e-8, 1e-300])
def test_fairgrad_of_small_alpha_is_the_sum_projected_onto_the_dual_cone(alpha: float) -> None:
    for seed in range(10):
        rows = gradients(2 + seed % 4, seed)
        matrix = rows @ rows.T
        expected = balancing.dual_projection(matrix, torch.ones(len(rows)))
        torch.testing.assert_close(
            balancing.fairgrad(matrix, alpha), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("alpha", [2.0, 50.0])
def test_weights_too_large_for_the_dtype_keep_their_proportions(alpha: float) -> None:
    rows = cases(3)["1e-15 to 1e15"]
    exact = balancing.fairgrad(gram(rows), alpha)
    found = balancing.fairgrad(gram(rows.float()), alpha)
    assert found.max() == torch.finfo(torch.float32).max
    expected = exact / exact.max()
    torch.testing.assert_close(found.double() / found.max(), expected, rtol=1e-4, atol=1e-40)
