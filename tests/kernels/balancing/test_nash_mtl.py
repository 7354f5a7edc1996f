"""Nash-MTL."""

import pytest
import torch

from kernels import balancing, gram

from .methods import SCALES, gradients, update


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # its solver's
def test_nash_mtl_agrees_with_torchjd_in_direction(torchjd) -> None:
    for seed in range(4):
        rows = gradients(2 + seed % 3, seed)
        oracle = torchjd.NashMTL(n_tasks=len(rows), max_norm=0.0, optim_niter=100)
        ours = update(balancing.nash_mtl, rows)
        assert torch.cosine_similarity(ours, oracle(rows), dim=0) > 1 - 1e-8


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # its solver's
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_nash_mtl_agrees_with_torchjd(torchjd, max_norm: float) -> None:
    for num_tasks, scale in ((2, 1.0), (3, 30.0), (5, 1.0)):
        rows = scale * gradients(num_tasks, num_tasks, 12)
        expected = torchjd.NashMTL(num_tasks, max_norm=max_norm, optim_niter=100)(rows)
        result = balancing.nash_mtl(rows @ rows.T, max_norm) @ rows
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        length = min(num_tasks**0.5, max_norm or torch.inf)
        torch.testing.assert_close(result.norm().item(), length, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 10.0])
def test_nash_mtl_has_its_norm_at_every_scale(max_norm: float, dtype: torch.dtype) -> None:
    rows = gradients(4, 6, 9).to(dtype)
    rows[1] = 0
    for scale in SCALES:
        update = balancing.nash_mtl(gram(scale * rows), max_norm) @ (scale * rows)
        length = min(3**0.5, max_norm or torch.inf) if scale > 0 else 0.0
        torch.testing.assert_close(update.norm().item(), length, rtol=1e-5, atol=0)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    for bad in (-0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="max_norm: expected a finite number of at least 0"):
            balancing.nash_mtl(matrix, bad)
