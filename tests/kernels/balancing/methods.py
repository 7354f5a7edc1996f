"""Every balancing method as a function of the Gram matrix alone, and gradients to try them on."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import balancing, draw_order
from kernels.balancing.pcgrad import pcgrad_weights, pcgrad_weights_reference
from kernels.balancing.states import Step

Method = Callable[[Tensor], Tensor]


def _gradvac(gram: Tensor) -> Tensor:
    order = draw_order(len(gram), 3)
    return balancing.gradvac(gram, order, torch.zeros_like(gram)).weights


def losses_of_steps(num_tasks: int) -> list[Tensor]:
    """Three steps' losses of so many tasks, none of which are alike."""
    return [
        torch.linspace(0.5, 1.5, num_tasks),
        torch.linspace(0.9, 0.6, num_tasks),
        torch.linspace(0.3, 1.1, num_tasks),
    ]


def after_steps(method: Callable[..., Step[Any]], **settings: float) -> Method:
    """The weights of a method with a state in its third step."""

    def weigh(gram: Tensor) -> Tensor:
        state = None
        for losses in losses_of_steps(gram.shape[-1]):
            weights, state = method(gram, losses, state, **settings)
        return weights

    return weigh


OF_LOSSES: dict[str, Method] = {
    "uw": after_steps(balancing.uw),
    "dwa": after_steps(balancing.dwa, window=1),
    "rlw": lambda gram: balancing.rlw(gram, 3),
    "gls": lambda gram: balancing.gls(gram, losses_of_steps(gram.shape[-1])[0]),
    "imtl_l": after_steps(balancing.imtl_l),
    "imtl": after_steps(balancing.imtl),
    "stch": after_steps(balancing.stch, warmup=2),
    "famo": after_steps(balancing.famo),
    "db_mtl": lambda gram: balancing.db_mtl(gram, losses_of_steps(gram.shape[-1])[0]),
}
"""Those that take losses, or numbers, besides the Gram matrix."""


METHODS: dict[str, Method] = {
    "sum": balancing.sum,
    "mean": balancing.mean,
    "proportional": lambda gram: balancing.proportional(gram, torch.arange(1, len(gram) + 1)),
    "pcgrad": lambda gram: pcgrad_weights(gram, draw_order(len(gram), 3)),
    "main_aux": balancing.main_aux,
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
    **OF_LOSSES,
}


# Equal rows tie in Krum, and GradNorm's sign jumps; both depend on the order of equal things.
_IN_ORDER = {"proportional", "pcgrad", "gradvac", "main_aux", "gradnorm", *OF_LOSSES}
SYMMETRIC = sorted(METHODS.keys() - _IN_ORDER)


VARIANTS: dict[str, Method] = METHODS | {
    "cagrad of radius 0": lambda matrix: balancing.cagrad(matrix, 0.0),
    "cagrad of radius 1": lambda matrix: balancing.cagrad(matrix, 1.0),
    "nash_mtl without a limit": lambda matrix: balancing.nash_mtl(matrix, 0.0),
    "nash_mtl with a limit": lambda matrix: balancing.nash_mtl(matrix, 1.0),
    "cagrad of radius 1e38": lambda matrix: balancing.cagrad(matrix, 1e38),
    "main_aux of weight 0": lambda matrix: balancing.main_aux(matrix, 0, 0.0),
    "main_aux of weight 1e38": lambda matrix: balancing.main_aux(matrix, 0, 1e38),
    **{
        f"fairgrad of alpha {alpha}": partial(balancing.fairgrad, alpha=alpha)
        for alpha in (1e-300, 1e-8, 1e-6, 1e-4, 0.01, 50.0, 1e300)
    },
    "fairgrad of alpha 0": lambda matrix: balancing.fairgrad(matrix, 0.0),
    "fairgrad of alpha 0.5": lambda matrix: balancing.fairgrad(matrix, 0.5),
    "aligned_mtl by the median": lambda matrix: balancing.aligned_mtl(matrix, scale_mode="median"),
    "aligned_mtl by rmse": lambda matrix: balancing.aligned_mtl(matrix, scale_mode="rmse"),
    **{
        f"{name} of {settings}": after_steps(getattr(balancing, name), **settings)
        for name, settings in (
            ("uw", {"lr": 3e38}),
            ("imtl_l", {"lr": 3e38}),
            ("imtl", {"lr": 3e38}),
            ("dwa", {"window": 1, "temperature": 1e-300}),
            ("dwa", {"window": 1, "temperature": 1e300}),
            ("stch", {"warmup": 1, "mu": 1e-300}),
            ("stch", {"warmup": 1, "mu": 1e300}),
            ("famo", {"lr": 3e38, "gamma": 3e38}),
            ("famo", {"lr": 0.0, "gamma": 0.0}),
        )
    },
    "the reference of pcgrad": lambda matrix: pcgrad_weights_reference(
        matrix, draw_order(len(matrix), 3), False, False
    ),
}


SOLVERS = {
    "symmetric_eigen": (),
    "project_onto_dual_cone": (torch.eye(4).double(),),
    "solve_mgda": (),
    "solve_cagrad": (0.5,),
    "solve_fairgrad": (1.0,),
}


PREFERENCES = torch.tensor([0.5, 3.0, 0.0, 1.0, 2.0, 0.1], dtype=torch.float64)
SCALE_MODES = ("min", "median", "rmse")
# TorchJD's own property tests go through these.
SCALES = (0.0, 1e-10, 1.0, 1e3, 1e10, 1e15)


def gradients(num_tasks: int, seed: int, columns: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tasks, columns, dtype=torch.float64, generator=generator)


def update(method: Method, rows: Tensor) -> Tensor:
    return method(rows @ rows.T) @ rows


def rows_with_preferences() -> Iterator[Tensor]:
    """One task to six, independent or not, two of them equal, one zero."""
    for seed in range(12):
        num_tasks = 1 + seed % 6
        rows = gradients(num_tasks, seed, 12 if seed % 2 else 3)
        if seed == 9:
            rows[1] = rows[0]
        if seed == 11:
            rows[2] = 0
        yield rows


def edge_cases(num_tasks: int) -> dict[str, Tensor]:
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


def assert_agrees_with_torchjd(name: str, oracle: Method, tolerance: float) -> None:
    for seed in range(12):
        rows = gradients(3 + seed % 4, seed)
        expected = oracle(rows @ rows.T) @ rows
        error = (update(METHODS[name], rows) - expected).norm() / expected.norm()
        assert error < tolerance


def assert_no_conflict(name: str) -> None:
    for seed in range(20):
        rows = gradients(2 + seed % 5, seed)
        assert (rows @ update(METHODS[name], rows)).min() > -1e-9
