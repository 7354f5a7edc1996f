"""FairGrad."""

import pytest
import torch
from torch import Tensor

from kernels import balancing, gram

from .methods import edge_cases, gradients


def test_fairgrad_agrees_with_torchjd_in_direction(torchjd) -> None:
    for seed in range(8):
        rows = gradients(2 + seed % 4, seed)
        for alpha in (0.5, 1.0, 2.0):
            expected = torchjd.FairGradWeighting(alpha)(rows @ rows.T) @ rows
            ours = balancing.fairgrad(rows @ rows.T, alpha) @ rows
            assert torch.cosine_similarity(ours, expected, dim=0) > 1 - 1e-8


def test_fairgrad_of_alpha_zero_is_torchjds(torchjd) -> None:
    matrix = gram(gradients(4, 1, 9))
    expected = torchjd.FairGradWeighting(0.0)(matrix)
    assert torch.equal(balancing.fairgrad(matrix, 0.0), expected)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("num_tasks", [1, 2, 5, 16])
def test_bargains_are_fair(num_tasks: int, alpha: float) -> None:
    for seed in range(5):
        rows = gradients(num_tasks, seed, columns=24)
        matrix = rows @ rows.T
        weights = balancing.fairgrad(matrix, alpha)
        assert (weights > 0).all()
        ratio = (matrix @ weights) / weights ** (-1 / alpha)
        torch.testing.assert_close(ratio / ratio.mean(), torch.ones_like(ratio), rtol=1e-6, atol=0)


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
        # The solver stops where the relative errors of all equations add up to this.
        settled = num_tasks * (1e-13 + 1e-15 / max(alpha, 1e-8))
        assert (gains > -settled * sizes).all()
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
    rows = edge_cases(3)["1e-15 to 1e15"]
    exact = balancing.fairgrad(gram(rows), alpha)
    found = balancing.fairgrad(gram(rows.float()), alpha)
    assert found.max() == torch.finfo(torch.float32).max
    expected = exact / exact.max()
    torch.testing.assert_close(found.double() / found.max(), expected, rtol=1e-4, atol=1e-40)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    for bad in (-0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="alpha: expected a finite number of at least 0"):
            balancing.fairgrad(matrix, bad)
