"""The update guard, and the registration of the operators on task gradients."""

import pytest
import torch
from torch import Tensor

from kernels.balancing.pcgrad import (
    draw_order,
    pcgrad_weights,
)
from kernels.registration.backend import backend
from kernels.surgery.surgery import combine, combined_norm, gram, update_guard


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
