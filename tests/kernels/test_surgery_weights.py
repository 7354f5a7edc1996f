"""The update guard, and the registration of the operators on task gradients."""

import math

import pytest
import torch
from torch import Tensor

from kernels.balancing.pcgrad import (
    draw_order,
    pcgrad_weights,
)
from kernels.registration.backend import backend
from kernels.surgery.surgery import combine, combined_norm, gram, update_guard
from kernels.surgery.update_summary import UpdateSummary, update_summary_reference


def conflicting_rows(num_tasks: int, columns: int, seed: int = 0) -> Tensor:
    """Float64 gradients of which about half of the pairs are in conflict."""
    return torch.randn(
        num_tasks,
        columns,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )


def test_norm_and_clipping_come_from_the_gram_matrix() -> None:
    rows = 3 * conflicting_rows(3, 500)
    matrix, order = gram(rows), draw_order(3, 1)
    weights = pcgrad_weights(matrix, order)
    norm = combine(rows, weights).norm()
    torch.testing.assert_close(combined_norm(matrix, weights), norm, rtol=1e-12, atol=0)

    for max_norm in (0.5, torch.tensor(0.5, dtype=torch.float64)):
        guard = update_guard(matrix, weights, max_norm=max_norm)
        torch.testing.assert_close(
            guard.scale * norm, torch.tensor(0.5).double(), rtol=1e-6, atol=0
        )
    assert update_guard(matrix, weights, max_norm=1e9).scale == 1
    assert update_guard(matrix, weights).scale == 1

    scaled = update_guard(1024**2 * matrix, weights, max_norm=0.5, loss_scale=1024.0)
    torch.testing.assert_close(scaled.norm, norm, rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.scale * 1024, guard.scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_guard_sees_what_is_not_finite(value: float) -> None:
    rows = conflicting_rows(3, 500).float()
    assert not update_guard(gram(rows), torch.ones(3)).skip
    rows[1, 123] = value
    assert update_guard(gram(rows), torch.ones(3)).skip
    # also where the weight of the bad row is zero, and with PCGrad's weights
    assert update_guard(gram(rows), torch.tensor([1.0, 0.0, 1.0])).skip
    assert update_guard(gram(rows), pcgrad_weights(gram(rows), draw_order(3, 1))).skip


def summary_cases() -> dict[str, tuple]:
    """Arguments of the summary of an update."""
    rows = torch.randn(4, 3, 50, generator=torch.Generator().manual_seed(1))
    grams, shares = rows @ rows.mT, torch.tensor([0.1, 0.2, 0.3, 0.4])
    weights, losses = torch.linspace(-1, 2, 12).view(4, 3), torch.tensor([0.5, 2.0, 0.0])
    many = torch.randn(300, 2, 9, generator=torch.Generator().manual_seed(2)).double()
    no_number, infinite, overflown = (grams.clone() for _ in range(3))
    no_number[2, 1, 1], infinite[3, 0, 0] = torch.nan, torch.inf
    overflown *= 1e38  # the norm is beyond float32 where G is not
    scale = torch.tensor(1024.0)
    return {
        "plain": (grams, weights, losses, shares, math.inf, None),
        "one group": (grams[:1], weights[:1], losses, torch.ones(1), 0.25, None),
        "clipped, scaled": (grams * scale**2, weights, losses, shares, 0.25, scale),
        "within the limit": (grams, weights, losses, shares, 1e4, None),
        "a limit of 0": (grams, weights, losses, shares, 0.0, None),
        "zero": (grams * 0, weights, losses, shares, 1.0, None),
        "one task": (
            *(grams[:, :1, :1].contiguous(), weights[:, :1].contiguous(), losses[:1], shares),
            *(1.0, None),
        ),
        "many groups": (
            *(many @ many.mT, many[:, :, 0].contiguous(), many[0, :, 0].contiguous()),
            *(many[:, 0, 0].contiguous().abs(), 1.0, None),
        ),
        "NaN": (no_number, weights, losses, shares, 1.0, None),
        "infinite": (infinite, weights, losses, shares, 1.0, None),
        "a norm that overflows": (overflown, 1e3 * weights, losses, shares, 1.0, None),
        "NaN as a loss": (grams, weights, losses * torch.nan, shares, 1.0, None),
        "NaN as a weight": (grams, weights * torch.nan, losses, shares, 1.0, None),
    }


@pytest.mark.parametrize("case", summary_cases())
def test_summary(case: str) -> None:
    arguments = summary_cases()[case]
    ours, plain = (
        torch.ops.superbert.update_summary(*arguments),
        update_summary_reference(*arguments),
    )
    for name, mine, expected in zip(UpdateSummary._fields, ours, plain, strict=True):
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=0, equal_nan=True, msg=name)
    skips = case.startswith(("NaN", "infinite", "a norm"))
    assert bool(ours[2]) == skips
    assert float(ours[3]) == skips


def operator_samples() -> dict[str, tuple]:
    rows, weights = torch.randn(3, 40), torch.ones(3)
    state = [torch.zeros(40) for _ in range(3)]
    scalars = [torch.tensor(1e-3), torch.tensor(1), torch.tensor(0.5), torch.tensor(False)]
    settings = (0.9, 0.999, 1e-8, 0.01)
    return {
        "gram": (rows.clone().requires_grad_(), [0, 10, 40]),
        "pcgrad_weights": (gram(rows), draw_order(3, 1), False, False),
        "draw_order": (torch.tensor(1), torch.tensor(0), 3),
        "combine": (rows.clone().requires_grad_(), weights.clone().requires_grad_()),
        "combine_out": (rows, weights, torch.zeros(40)),
        "combine_adamw_": (rows, weights, *state, torch.zeros(40).half(), *scalars, *settings),
        "combine_adamw_segments_": (
            *(rows, torch.ones(2, 3), *state, torch.zeros(40).half()),
            *([16, 40], [1, 0], 32, *scalars, *settings),
        ),
        "update_summary": (
            *(gram(rows, [0, 10, 40]), torch.ones(2, 3), weights, torch.tensor([0.25, 0.75])),
            *(0.5, torch.tensor(2.0)),
        ),
    }


@pytest.mark.parametrize("name", operator_samples())
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.superbert, name).default, operator_samples()[name])


@pytest.mark.parametrize("name", operator_samples())
def test_the_backend_is_told(name: str) -> None:
    assert backend(name, "cpu") == "cpp"
    assert backend(name, "cuda:0") in ("cuda", "torch")


def test_an_unknown_operator_has_no_backend() -> None:
    with pytest.raises(ValueError, match="no operator 'grom'"):
        backend("grom", "cpu")
