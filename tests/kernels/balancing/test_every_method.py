"""Properties of every balancing method."""

import importlib
import inspect
from functools import partial

import pytest
import torch
from torch import Tensor

from kernels import balancing, draw_order, gram
from kernels.balancing.pcgrad import pcgrad_weights_reference

from .methods import (
    METHODS,
    SCALE_MODES,
    SCALES,
    SYMMETRIC,
    VARIANTS,
    Method,
    gradients,
    update,
)


def test_torchjd_weightings_are_methods_too(torchjd) -> None:
    rows = gradients(4, 1)
    assert torchjd.MeanWeighting()(rows @ rows.T).shape == balancing.mean(rows @ rows.T).shape


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_free_of_scale(name: str, dtype: torch.dtype) -> None:
    rows = gradients(4, 2).to(dtype)
    weights = METHODS[name](rows @ rows.T)
    assert weights.dtype == dtype
    for scale in (2.0**-40, 2.0**40):  # 1e-12 and 1e12
        scaled = METHODS[name]((scale * rows) @ (scale * rows).T)
        torch.testing.assert_close(scaled, weights, rtol=1e-5, atol=1e-7)


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
def test_free_of_scale_with_settings(name: str, dtype: torch.dtype) -> None:
    rows = gradients(4, 6, 9).to(dtype)
    expected = FREE_OF_SCALE[name](gram(rows))
    assert expected.dtype == dtype
    for scale in SCALES:
        result = FREE_OF_SCALE[name](gram(scale * rows))
        assert torch.isfinite(result).all()
        if scale > 0:
            # Scaling rounds, and float32 gradients that differ by a bit are other ones.
            torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


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


OWN_LENGTH = {"nash_mtl", "fairgrad", "cagrad", "uw", "imtl_l", "imtl", "stch", "db_mtl"}
"""Their updates have lengths of their own, or by the losses."""


def test_one_task_keeps_its_direction() -> None:
    rows = gradients(1, 6)
    for name in METHODS.keys() - {"krum"}:  # Krum needs three
        ours = update(METHODS[name], rows)
        if name not in OWN_LENGTH:
            torch.testing.assert_close(ours, rows[0])
        torch.testing.assert_close(ours / ours.norm(), rows[0] / rows[0].norm())


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
    names = set(balancing.__all__) - {"pcgrad"}  # an operator, with messages of its own
    assert len(names) > 15
    tensors = ("sizes", "order", "targets", "weights", "loss_ratios", "losses")
    others = {**dict.fromkeys(tensors, gram), "seed": 1}
    for name in names:
        taken = inspect.signature(getattr(balancing, name)).parameters.keys() & others
        with pytest.raises(ValueError, match=message):
            getattr(balancing, name)(gram, **{argument: others[argument] for argument in taken})


@pytest.mark.parametrize(("old", "new"), [("auxiliary_pcgrad", "main_aux"), ("total", "sum")])
def test_old_names_warn(old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"balancing.{old} is balancing.{new} now"):
        assert getattr(balancing, old) is getattr(balancing, new)


def test_functions_come_before_the_files_of_their_names() -> None:
    for name in balancing.__all__:
        assert callable(getattr(balancing, name)), name
        assert importlib.import_module(f"kernels.balancing.{name}").__doc__
        assert callable(getattr(balancing, name)), name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        balancing.nonsense  # noqa: B018


def of_all_groups() -> dict[str, Method]:
    """Every method and its settings on ``[K, K]`` or ``[G, K, K]`` for five tasks."""
    order, given = draw_order(5, 3), torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0])
    own_order = {
        "pcgrad": lambda gram: balancing.pcgrad(gram, order),
        "the reference of pcgrad": lambda gram: pcgrad_weights_reference(gram, order, False, False),
        "gradvac": lambda gram: balancing.gradvac(gram, order, torch.full((5, 5), 0.1)).weights,
        "targets of gradvac": lambda gram: balancing.gradvac(
            gram, order, torch.full_like(gram, 0.1)
        ).targets.flatten(-2),
        "proportional": lambda gram: balancing.proportional(gram, torch.arange(1, 6)),
        "gradnorm": lambda gram: balancing.gradnorm(
            gram, torch.ones_like(gram[..., 0, :]), torch.linspace(0.5, 1.5, 5)
        ),
    }
    with_preferences = {
        f"{name}, preferences": partial(getattr(balancing, name), pref_vector=given)
        for name in ("upgrad", "dual_projection", "config", "aligned_mtl")
    }
    return VARIANTS | own_order | with_preferences


@pytest.mark.parametrize("name", of_all_groups())
def test_groups_are_balanced_as_each_by_itself(name: str) -> None:
    """Ugly ones among them do not touch the others."""
    rows = torch.stack([gradients(5, seed, 9) for seed in range(7)]).float()
    rows[1, 2] = rows[4] = 0
    rows[2, 1], rows[5, 1] = rows[2, 0], -rows[5, 0]
    rows[3, 0, 0] = torch.nan
    grams, method = rows @ rows.mT, of_all_groups()[name]
    each = torch.stack([method(gram) for gram in grams])
    assert each[3].isnan().all() or name == "targets of gradvac"
    torch.testing.assert_close(method(grams), each, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(method(grams[:1]), each[:1], rtol=1e-6, atol=0)


def test_arguments_of_groups_may_be_their_own() -> None:
    grams = torch.stack([rows @ rows.T for rows in (gradients(4, 1), gradients(4, 2))])
    weights, ratios = torch.rand(2, 4).double(), torch.rand(2, 4).double()
    together = balancing.gradnorm(grams, weights, ratios)
    for ours, *arguments in zip(together, grams, weights, ratios, strict=True):
        torch.testing.assert_close(ours, balancing.gradnorm(*arguments))
    with pytest.raises(ValueError, match=r"weights: expected \[4\], got \[3, 4\]"):
        balancing.gradnorm(grams, torch.ones(3, 4), ratios)
