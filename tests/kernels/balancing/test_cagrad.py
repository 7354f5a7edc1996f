"""CAGrad."""

import pytest
import torch

from kernels import balancing, gram

from .methods import assert_agrees_with_torchjd, gradients


def test_agrees_with_torchjd(torchjd) -> None:
    assert_agrees_with_torchjd("cagrad", torchjd.CAGradWeighting(0.5), 1e-3)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 2.0, 10.0])
def test_of_any_radius_agrees_with_torchjd(torchjd, c: float) -> None:
    oracle = torchjd.CAGradWeighting(c, norm_eps=1e-12)
    for seed in range(8):
        rows = gradients(2 + seed % 5, seed, 12)
        expected = oracle(rows @ rows.T) @ rows
        result = balancing.cagrad(rows @ rows.T, c) @ rows
        assert (result - expected).norm() < 1e-3 * expected.norm()  # its solver's tolerance


@pytest.mark.parametrize("c", [0.0, 0.3, 0.5, 0.9])
def test_cagrad_is_optimal(c: float) -> None:
    for seed in range(10):
        rows = gradients(2 + seed % 5, seed)
        average = rows.mean(0)
        ours = balancing.cagrad(rows @ rows.T, c) @ rows
        radius = c * average.norm()
        assert (ours - average).norm() <= radius * (1 + 1e-6) + 1e-12
        worst = (rows @ ours).min()
        for trial in range(50):
            step = torch.randn(
                12, dtype=torch.float64, generator=torch.Generator().manual_seed(trial)
            )
            other = ours + 0.05 * average.norm() * step
            other = average + (other - average) * min(1.0, radius / (other - average).norm())
            assert (rows @ other).min() <= worst + 1e-6 * rows.square().sum(1).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [1.0, 1.5, 2.0, 1e3, 1e9])
def test_cagrad_from_one_on_worsens_no_task(c: float, dtype: torch.dtype) -> None:
    for seed in range(40):
        # As many columns as tasks or fewer: often the hull of the gradients holds zero.
        rows = gradients(2 + seed % 7, seed, (3, 1, 12, 6)[seed % 4]).to(dtype)
        if seed % 3 == 0:
            rows[0] = -2 * rows[1]
        if seed % 5 == 0:
            rows[0] = 0
        update = balancing.cagrad(gram(rows), c) @ rows
        length = c * rows.norm(dim=1).mean()
        assert torch.isfinite(update).all()
        eps = torch.finfo(dtype).eps
        assert (rows @ update >= -1e3 * eps * length * rows.norm(dim=1)).all()
        assert (update - rows.mean(0)).norm() <= c * rows.mean(0).norm() * (1 + 1e-3) + eps * length


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 3.0, 1e6])
def test_cagrad_of_one_direction(c: float) -> None:
    rows = gradients(1, 2, 7)
    for copies in (1, 2, 5):
        result = balancing.cagrad(gram(rows.expand(copies, 7).contiguous()), c)
        torch.testing.assert_close(result.sum().item(), 1 + c, rtol=1e-9, atol=0)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    for bad in (-0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="c: expected a finite number of at least 0"):
            balancing.cagrad(matrix, bad)
