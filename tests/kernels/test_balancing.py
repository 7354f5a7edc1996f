"""Balancing methods: TorchJD as oracle, and what each method promises."""

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import balancing
from kernels.surgery.surgery import draw_order, pcgrad_weights

Method = Callable[[Tensor], Tensor]


def _gradvac(gram: Tensor) -> Tensor:
    order = draw_order(len(gram), 3)
    return balancing.gradvac(gram, order, torch.zeros_like(gram)).weights


METHODS: dict[str, Method] = {
    "total": balancing.total,
    "mean": balancing.mean,
    "proportional": lambda gram: balancing.proportional(gram, torch.arange(1, len(gram) + 1)),
    "pcgrad": lambda gram: pcgrad_weights(gram, draw_order(len(gram), 3)),
    "auxiliary_pcgrad": balancing.auxiliary_pcgrad,
    "gradvac": _gradvac,
    "upgrad": balancing.upgrad,
    "dual_projection": balancing.dual_projection,
    "mgda": balancing.mgda,
    "cagrad": balancing.cagrad,
    "nash_mtl": balancing.nash_mtl,
    "fairgrad": lambda gram: balancing.fairgrad(gram, alpha=2.0),
    "imtl_g": balancing.imtl_g,
    "aligned_mtl": balancing.aligned_mtl,
    "config": balancing.config,
    "krum": balancing.krum,
    "gradnorm": lambda gram: balancing.gradnorm(
        gram, torch.ones_like(gram[0]), torch.linspace(0.5, 1.5, len(gram))
    ),
}
# Equal rows tie in Krum, and GradNorm's sign jumps; both depend on the order of equal things.
SYMMETRIC = sorted(
    METHODS.keys() - {"proportional", "pcgrad", "gradvac", "auxiliary_pcgrad", "gradnorm"}
)


def gradients(num_tasks: int, seed: int, columns: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tasks, columns, dtype=torch.float64, generator=generator)


def update(method: Method, rows: Tensor) -> Tensor:
    return method(rows @ rows.T) @ rows


# ---- against TorchJD -----------------------------------------------------------------------------


# TorchJD adds 1e-4 of the trace to the diagonal before it solves a quadratic program: where
# gradients conflict strongly the result moves by about the root of that.
ORACLES: dict[str, tuple[Callable[..., Method], float]] = {
    "upgrad": (lambda jd: jd.UPGradWeighting(), 1e-2),
    "dual_projection": (lambda jd: jd.DualProjWeighting(), 1e-2),
    "cagrad": (lambda jd: jd.CAGradWeighting(0.5), 1e-3),
    "imtl_g": (lambda jd: jd.IMTLGWeighting(), 1e-9),
    "aligned_mtl": (lambda jd: jd.AlignedMTLWeighting(), 1e-9),
    "krum": (lambda jd: jd.KrumWeighting(0, 1), 1e-9),
}


@pytest.mark.parametrize("name", ORACLES)
def test_agrees_with_torchjd(torchjd, name: str) -> None:
    make_oracle, tolerance = ORACLES[name]
    oracle = make_oracle(torchjd)
    for seed in range(12):
        rows = gradients(3 + seed % 4, seed)
        expected = oracle(rows @ rows.T) @ rows
        error = (update(METHODS[name], rows) - expected).norm() / expected.norm()
        assert error < tolerance


def test_config_agrees_with_torchjd(torchjd) -> None:
    for seed in range(12):
        rows = gradients(1 + seed % 6, seed)
        expected = torchjd.ConFIG()(rows)
        torch.testing.assert_close(update(balancing.config, rows), expected, rtol=1e-9, atol=1e-9)


def test_fairgrad_agrees_with_torchjd_in_direction(torchjd) -> None:
    for seed in range(8):
        rows = gradients(2 + seed % 4, seed)
        for alpha in (0.5, 1.0, 2.0):
            expected = torchjd.FairGradWeighting(alpha)(rows @ rows.T) @ rows
            ours = balancing.fairgrad(rows @ rows.T, alpha) @ rows
            assert torch.cosine_similarity(ours, expected, dim=0) > 1 - 1e-8


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")  # its solver's
def test_nash_mtl_agrees_with_torchjd_in_direction(torchjd) -> None:
    for seed in range(4):
        rows = gradients(2 + seed % 3, seed)
        oracle = torchjd.NashMTL(n_tasks=len(rows), max_norm=0.0, optim_niter=100)
        ours = update(balancing.nash_mtl, rows)
        assert torch.cosine_similarity(ours, oracle(rows), dim=0) > 1 - 1e-8


def test_gradvac_agrees_with_torchjd(torchjd) -> None:
    oracle, targets = torchjd.GradVacWeighting(beta=0.5), torch.zeros(4, 4, dtype=torch.float64)
    for step in range(6):
        rows = gradients(4, step)
        torch.manual_seed(step)
        expected = oracle(rows @ rows.T)
        torch.manual_seed(step)  # the same order, its own task put last, where it is passed over
        order = []
        for task in range(4):
            others = [other for other in range(4) if other != task]
            order.append([others[i] for i in torch.randperm(3).tolist()] + [task])
        weights, targets = balancing.gradvac(rows @ rows.T, torch.tensor(order), targets)
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)


def test_torchjd_weightings_are_methods_too(torchjd) -> None:
    rows = gradients(4, 1)
    assert torchjd.MeanWeighting()(rows @ rows.T).shape == balancing.mean(rows @ rows.T).shape


# ---- against their definitions -------------------------------------------------------------------


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 8, 20])
def test_mgda_is_the_shortest_convex_combination(num_tasks: int) -> None:
    for seed in range(10):
        rows = gradients(num_tasks, seed, columns=6)
        weights = balancing.mgda(rows @ rows.T)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(), torch.tensor(1.0).double())
        shortest = weights @ rows
        # Optimal: no gradient has a smaller product with it than it has with itself.
        assert (rows @ shortest).min() > shortest.square().sum() - 1e-6 * rows.square().sum(
            1
        ).mean()


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


def test_imtl_projects_equally() -> None:
    rows = gradients(5, 1)
    ours = update(balancing.imtl_g, rows)
    products = rows @ ours / rows.norm(dim=1)
    torch.testing.assert_close(products, products.mean().expand(5), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["upgrad", "dual_projection", "mgda", "config", "imtl_g"])
def test_no_conflict_with_any_task(name: str) -> None:
    for seed in range(20):
        rows = gradients(2 + seed % 5, seed)
        assert (rows @ update(METHODS[name], rows)).min() > -1e-9


def test_auxiliary_tasks_enter_as_one() -> None:
    rows = gradients(4, 3)
    auxiliary = 0.3 * rows[1:].sum(0)
    for main in (rows[0], -auxiliary + 0.1 * rows[0]):  # with and without a conflict
        stacked = torch.cat([main[None], rows[1:]])
        expected = main + auxiliary
        if (dot := main @ auxiliary) < 0:
            expected = expected - dot / auxiliary.square().sum() * auxiliary
            expected = expected - dot / main.square().sum() * main
        torch.testing.assert_close(update(balancing.auxiliary_pcgrad, stacked), expected)
    swapped = balancing.auxiliary_pcgrad((rows @ rows.T).flip(0, 1), main=3)
    torch.testing.assert_close(swapped.flip(0), balancing.auxiliary_pcgrad(rows @ rows.T))


def test_gradnorm_pulls_norms_together() -> None:
    gram, weights = torch.diag(torch.tensor([1.0, 100.0])), torch.ones(2)
    for _ in range(500):
        weights = balancing.gradnorm(gram, weights, torch.ones(2), lr=0.005)
    torch.testing.assert_close(weights, torch.tensor([20 / 11, 2 / 11]), rtol=0.1, atol=0)


# ---- what holds for all --------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_of_scale(name: str, dtype: torch.dtype) -> None:
    rows = gradients(4, 2).to(dtype)
    weights = METHODS[name](rows @ rows.T)
    assert weights.dtype == dtype
    for scale in (2.0**-40, 2.0**40):  # 1e-12 and 1e12
        scaled = METHODS[name]((scale * rows) @ (scale * rows).T)
        torch.testing.assert_close(scaled, weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_tasks_can_be_permuted(name: str) -> None:
    rows = gradients(5, 4)
    permutation = torch.tensor([3, 0, 4, 1, 2])
    expected = METHODS[name](rows @ rows.T)[permutation]
    result = METHODS[name](rows[permutation] @ rows[permutation].T)
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=1e-9)


def ugly_gradients() -> dict[str, Tensor]:
    rows = gradients(4, 5)
    cases = {name: rows.clone() for name in ("a zero gradient", "equal", "opposite", "sizes")}
    cases["a zero gradient"][1] = 0
    cases["equal"][1] = rows[0]
    cases["opposite"][1] = -rows[0]
    cases["sizes"] *= torch.tensor([[1.0], [1e-6], [1e6], [1.0]])
    cases["all zero"] = torch.zeros(4, 12, dtype=torch.float64)
    cases["all equal"] = rows[:1].expand(4, 12)
    return cases


@pytest.mark.parametrize("case", ugly_gradients())
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ugly_gradients_give_finite_updates(name: str, case: str, dtype: torch.dtype) -> None:
    rows = ugly_gradients()[case].to(dtype)
    result = update(METHODS[name], rows)
    assert torch.isfinite(result).all()
    if name != "fairgrad":  # alpha other than 1 favours small gradients without bound
        assert result.norm() <= 1e3 * rows.norm(dim=1).max()


@pytest.mark.parametrize("name", METHODS)
def test_not_a_number_ends(name: str) -> None:
    rows = gradients(4, 5)
    rows[2, 3] = torch.nan
    METHODS[name](rows @ rows.T)  # whatever it says, update_guard skips the step


def test_one_task_keeps_its_direction() -> None:
    rows = gradients(1, 6)
    for name in METHODS.keys() - {"krum"}:  # Krum needs three
        ours = update(METHODS[name], rows)
        if name not in ("nash_mtl", "fairgrad", "cagrad"):  # these have a length of their own
            torch.testing.assert_close(ours, rows[0])
        torch.testing.assert_close(ours / ours.norm(), rows[0] / rows[0].norm())


SOLVERS = {
    "symmetric_eigen": (),
    "project_onto_dual_cone": (torch.eye(4).double(),),
    "minimize_norm": (),
    "avoid_conflict": (0.5,),
    "bargain": (1.0,),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_opcheck(name: str) -> None:
    rows = gradients(4, 5)
    operator = getattr(torch.ops.superbert, name).default
    torch.library.opcheck(operator, (rows @ rows.T, *SOLVERS[name]))


def test_symmetric_eigen() -> None:
    for num_tasks in (1, 2, 7, 64):
        rows = gradients(num_tasks, 1, columns=40)  # rank 40 at most
        matrix = rows @ rows.T
        values, vectors = torch.ops.superbert.symmetric_eigen(matrix)
        identity = torch.eye(num_tasks, dtype=torch.float64)
        torch.testing.assert_close(vectors.T @ vectors, identity, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            vectors @ torch.diag(values) @ vectors.T,
            matrix,
            rtol=0,
            atol=1e-11 * matrix.norm().item(),
        )


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    for bad in (-0.1, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="c: expected a finite number of at least 0"):
            balancing.cagrad(matrix, bad)
        with pytest.raises(ValueError, match="max_norm: expected a finite number of at least 0"):
            balancing.nash_mtl(matrix, bad)
        with pytest.raises(ValueError, match="alpha: expected a finite number of at least 0"):
            balancing.fairgrad(matrix, bad)
        with pytest.raises(ValueError, match="beta: expected 0 to 1"):
            balancing.gradvac(matrix, draw_order(3, 1), torch.zeros(3, 3), bad)
    for method in (balancing.upgrad, balancing.dual_projection, balancing.config):
        with pytest.raises(ValueError, match=r"pref_vector: expected \[3\], got \[1, 3\]"):
            method(matrix, torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"pref_vector: expected \[3\], got \[4\]"):
        balancing.aligned_mtl(matrix, torch.ones(4))
    with pytest.raises(ValueError, match="scale_mode: expected min, median or rmse, got 'max'"):
        balancing.aligned_mtl(matrix, scale_mode="max")
    with pytest.raises(ValueError, match="Krum of 3 gradients needs"):
        balancing.krum(matrix, num_byzantine=1)
    with pytest.raises(ValueError, match="num_byzantine from 0"):
        balancing.krum(matrix, num_byzantine=-1)
    with pytest.raises(ValueError, match="gram must be a contiguous float64"):
        torch.ops.superbert.minimize_norm(matrix)
    with pytest.raises(ValueError, match="main: expected 0 to 2, got 3"):
        balancing.auxiliary_pcgrad(matrix, main=3)
    with pytest.raises(ValueError, match=r"sizes: expected \[3\], got \[2\]"):
        balancing.proportional(matrix, torch.ones(2))
    with pytest.raises(ValueError, match=r"order: expected \[3, 3\], got \[3\]"):
        balancing.gradvac(matrix, torch.arange(3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"loss_ratios: expected \[3\], got \[1\]"):
        balancing.gradnorm(matrix, torch.ones(3), torch.ones(1))


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.ones(3), r"gram: expected \[K, K\], got \[3\]"),
        (torch.ones(2, 3), r"gram: expected \[K, K\], got \[2, 3\]"),
        (torch.ones(0, 0), r"gram: expected \[K, K\], got \[0, 0\]"),
        (torch.ones(4, 4, dtype=torch.int64), "gram: expected floating point, got torch.int64"),
    ],
)
def test_what_is_no_gram_matrix_is_refused_by_name(gram: Tensor, message: str) -> None:
    methods = {
        name: method
        for name, method in vars(balancing).items()
        if getattr(method, "__module__", None) == balancing.__name__ and name[0].islower()
    }
    assert len(methods) > 15
    others = {"sizes": gram, "order": gram, "targets": gram, "weights": gram, "loss_ratios": gram}
    for name in methods:
        taken = inspect.signature(methods[name]).parameters.keys() & others
        with pytest.raises(ValueError, match=message):
            methods[name](gram, **{argument: others[argument] for argument in taken})
