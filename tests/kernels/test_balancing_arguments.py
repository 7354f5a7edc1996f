"""Preferences, scale modes, norms and radii of the balancing methods, with TorchJD as oracle."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import balancing, gram

from .conftest import exact_projector

Method = Callable[[Tensor], Tensor]
PREFERENCES = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.0, 0.1], dtype=torch.float64)
SCALE_MODES = ("min", "median", "rmse")
# TorchJD's own property tests go through these.
SCALES = (0.0, 1e-10, 1.0, 1e3, 1e10, 1e15)


def gradients(num_tasks: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tasks, columns, dtype=torch.float64, generator=generator)


def cases() -> Iterator[Tensor]:
    """One task to six, independent or not, two of them equal, one zero."""
    for seed in range(12):
        num_tasks = 1 + seed % 6
        rows = gradients(num_tasks, 12 if seed % 2 else 3, seed)
        if seed == 9:
            rows[1] = rows[0]
        if seed == 11:
            rows[2] = 0
        yield rows


# ---- against TorchJD -----------------------------------------------------------------------------


def test_projections_with_preferences_agree_with_torchjd(torchjd) -> None:
    for rows in cases():
        given = PREFERENCES[: len(rows)]
        matrix = rows @ rows.T
        for ours, theirs in (
            (balancing.upgrad, torchjd.UPGradWeighting(given, exact_projector())),
            (balancing.dual_projection, torchjd.DualProjWeighting(given, exact_projector())),
        ):
            expected = theirs(matrix) @ rows
            result = ours(matrix, given) @ rows
            # Where the hull holds zero, the result is zero up to what regularises either.
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_config_with_preferences_agrees_with_torchjd(torchjd) -> None:
    for rows in cases():
        given = PREFERENCES[: len(rows)]
        result = balancing.config(rows @ rows.T, given) @ rows
        torch.testing.assert_close(result, torchjd.ConFIG(given)(rows), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("scale_mode", SCALE_MODES)
@pytest.mark.parametrize("with_preferences", [False, True])
def test_aligned_mtl_agrees_with_torchjd(torchjd, scale_mode: str, with_preferences: bool) -> None:
    for rows in cases():
        given = PREFERENCES[: len(rows)] if with_preferences else None
        matrix = rows @ rows.T
        expected = torchjd.AlignedMTLWeighting(given, scale_mode)(matrix)
        result = balancing.aligned_mtl(matrix, given, scale_mode)
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("c", [0.0, 0.5, 1.0, 2.0, 10.0])
def test_cagrad_agrees_with_torchjd(torchjd, c: float) -> None:
    oracle = torchjd.CAGradWeighting(c, norm_eps=1e-12)
    for seed in range(8):
        rows = gradients(2 + seed % 5, 12, seed)
        expected = oracle(rows @ rows.T) @ rows
        result = balancing.cagrad(rows @ rows.T, c) @ rows
        assert (result - expected).norm() < 1e-3 * expected.norm()  # its solver's tolerance


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # its solver's
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1.0, 2.0, 100.0])
def test_nash_mtl_agrees_with_torchjd(torchjd, max_norm: float) -> None:
    for num_tasks, scale in ((2, 1.0), (3, 30.0), (5, 1.0)):
        rows = scale * gradients(num_tasks, 12, num_tasks)
        expected = torchjd.NashMTL(num_tasks, max_norm=max_norm, optim_niter=100)(rows)
        result = balancing.nash_mtl(rows @ rows.T, max_norm) @ rows
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
        length = min(num_tasks**0.5, max_norm or torch.inf)
        torch.testing.assert_close(result.norm().item(), length, rtol=1e-9, atol=0)


def test_fairgrad_of_alpha_zero_is_torchjds(torchjd) -> None:
    matrix = gram(gradients(4, 9, 1))
    expected = torchjd.FairGradWeighting(0.0)(matrix)
    assert torch.equal(balancing.fairgrad(matrix, 0.0), expected)


# ---- against their definitions -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [1.0, 1.5, 2.0, 1e3, 1e9])
def test_cagrad_from_one_on_worsens_no_task(c: float, dtype: torch.dtype) -> None:
    for seed in range(40):
        # As many columns as tasks or fewer: often the hull of the gradients holds zero.
        rows = gradients(2 + seed % 7, (3, 1, 12, 6)[seed % 4], seed).to(dtype)
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
    rows = gradients(1, 7, 2)
    for copies in (1, 2, 5):
        result = balancing.cagrad(gram(rows.expand(copies, 7).contiguous()), c)
        torch.testing.assert_close(result.sum().item(), 1 + c, rtol=1e-9, atol=0)


def test_aligned_mtl_makes_singular_values_equal() -> None:
    rows = gradients(5, 9, 3)
    matrix = rows @ rows.T
    values = torch.linalg.eigvalsh(matrix)
    expected = {"min": values.min(), "median": values.median(), "rmse": values.mean()}
    for scale_mode in SCALE_MODES:
        transformed = torch.stack(
            [balancing.aligned_mtl(matrix, each, scale_mode) @ rows for each in torch.eye(5)]
        )
        identity = torch.eye(5, dtype=torch.float64)
        torch.testing.assert_close(transformed @ transformed.T, expected[scale_mode] * identity)


def test_preferences_decide_whose_gradient_is_projected() -> None:
    rows = gradients(3, 9, 4)
    matrix = rows @ rows.T
    only = torch.tensor([0, 1, 0])  # of any dtype
    projected = balancing.dual_projection(matrix, only)
    torch.testing.assert_close(balancing.upgrad(matrix, only), projected)
    torch.testing.assert_close(balancing.upgrad(matrix, 3 * only), 3 * projected)
    assert ((rows @ (projected @ rows)) > -1e-9).all()


def test_cosines_are_in_proportion_to_preferences() -> None:
    rows, given = gradients(4, 9, 5), torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    update = balancing.config(rows @ rows.T, given) @ rows
    cosines = torch.cosine_similarity(rows, update[None])
    torch.testing.assert_close(cosines / given, (cosines / given).mean().expand(4))


# ---- what holds for all --------------------------------------------------------------------------

GIVEN = torch.tensor([0.5, 3.0, 0.0, 1.0])
FREE_OF_SCALE: dict[str, Method] = {
    "upgrad": partial(balancing.upgrad, pref_vector=GIVEN),
    "dual_projection": partial(balancing.dual_projection, pref_vector=GIVEN),
    "config": partial(balancing.config, pref_vector=GIVEN),
    "cagrad 1": partial(balancing.cagrad, c=1.0),
    "cagrad 2": partial(balancing.cagrad, c=2.0),
    "fairgrad 0": partial(balancing.fairgrad, alpha=0.0),
    **{
        f"aligned_mtl {mode}": partial(balancing.aligned_mtl, pref_vector=GIVEN, scale_mode=mode)
        for mode in SCALE_MODES
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FREE_OF_SCALE)
def test_free_of_scale(name: str, dtype: torch.dtype) -> None:
    rows = gradients(4, 9, 6).to(dtype)
    expected = FREE_OF_SCALE[name](gram(rows))
    assert expected.dtype == dtype
    for scale in SCALES:
        result = FREE_OF_SCALE[name](gram(scale * rows))
        assert torch.isfinite(result).all()
        if scale > 0:
            # Scaling rounds, and float32 gradients that differ by a bit are other ones.
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 10.0])
def test_nash_mtl_has_its_norm_at_every_scale(max_norm: float, dtype: torch.dtype) -> None:
    rows = gradients(4, 9, 6).to(dtype)
    rows[1] = 0
    for scale in SCALES:
        update = balancing.nash_mtl(gram(scale * rows), max_norm) @ (scale * rows)
        length = min(3**0.5, max_norm or torch.inf) if scale > 0 else 0.0
        torch.testing.assert_close(update.norm().item(), length, rtol=1e-5, atol=0)
