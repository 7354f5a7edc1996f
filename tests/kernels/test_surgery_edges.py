"""The whole update, gram -> weights -> guard -> combine + AdamW, on ugly gradients."""

import pytest
import torch
from torch import Tensor

from kernels.balancing.pcgrad import draw_order, pcgrad_weights
from kernels.surgery.surgery import combine, combine_adamw_, gram, update_guard

from .pcgrad_reference import reference_pcgrad
from .tolerance import assert_within_twice

COLUMNS = 3001


def task_rows(num_tasks: int = 3, seed: int = 0) -> Tensor:
    """Float32 gradients of which some conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_tasks, COLUMNS, generator=generator)
    rows[1:] -= 0.7 * rows[:1]
    return rows


def plain_pcgrad(rows: Tensor, order: Tensor) -> Tensor:
    """Algorithm 1 as torch computes it in the rows' own dtype."""
    projected = rows.clone()
    for i, others in enumerate(order.tolist()):
        for j in others:
            dot = projected[i] @ rows[j]
            if j != i and dot < 0:
                projected[i] -= dot / (rows[j] @ rows[j]) * rows[j]
    return projected.sum(0)


def scaled(*scales: float) -> Tensor:
    return task_rows() * torch.tensor(scales)[:, None]


CASES: dict[str, Tensor] = {
    "conflicts": task_rows(),
    "one task": task_rows(1),
    "a zero gradient": scaled(1, 0, 1),
    "all zero": torch.zeros(3, COLUMNS),
    "equal": task_rows()[[0, 0, 1]],
    "opposite": torch.stack([task_rows()[0], -task_rows()[0], task_rows()[1]]),
    "1e12 apart": scaled(1, 1e-6, 1e6),
    "tiny": scaled(1e-12, 1e-12, 1e-12),
    "huge": scaled(1e12, 1e12, 1e12),
}


@pytest.mark.parametrize("case", CASES)
def test_pcgrad(case: str) -> None:
    rows, order = CASES[case], draw_order(len(CASES[case]), 5)
    result = combine(rows, pcgrad_weights(gram(rows), order))
    exact = reference_pcgrad(rows, order)
    # Where gradients cancel, what is left is rounding: it is measured against their size.
    size = float(rows.norm())
    error, plain = (float((x.double() - exact).norm()) for x in (result, plain_pcgrad(rows, order)))
    assert error <= 2 * plain + 2 * torch.finfo(torch.float32).eps * size


def test_products_too_small_for_a_float_count_as_no_conflict() -> None:
    # Denormal gradients (1e-40): their dot products vanish, and the sum is what remains.
    rows, order = scaled(1e-40, 1e-40, 1e-40), draw_order(3, 5)
    assert (rows != 0).any()
    result = combine(rows, pcgrad_weights(gram(rows), order))
    assert_within_twice(result, rows.sum(0), rows.double().sum(0))
    guard = update_guard(gram(rows), torch.ones(3), max_norm=1.0)
    assert guard.scale == 1
    assert not guard.skip


def test_no_columns() -> None:
    rows = torch.empty(3, 0)
    weights = pcgrad_weights(gram(rows), draw_order(3, 5))
    assert weights.tolist() == [1.0, 1.0, 1.0]
    assert combine(rows, weights).shape == (0,)
    state = [torch.empty(0) for _ in range(3)]
    combine_adamw_(rows, weights, *state, lr=1e-3, step=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bad_value_leaves_weights_and_moments_untouched(
    dtype: torch.dtype, value: float
) -> None:
    rows = task_rows().to(dtype)
    rows[1, 77] = value
    generator = torch.Generator().manual_seed(1)
    state = [torch.rand(COLUMNS, generator=generator) for _ in range(3)]
    before = [tensor.clone() for tensor in state]
    matrix = gram(rows)
    weights = pcgrad_weights(matrix, draw_order(3, 5))
    guard = update_guard(matrix, weights, max_norm=1.0)
    assert guard.skip
    combine_adamw_(rows, weights, *state, lr=1e-3, step=1, scale=guard.scale, skip=guard.skip)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_the_same_seed_gives_the_same_bits() -> None:
    def train(seed: int) -> Tensor:
        state = [torch.zeros(COLUMNS) for _ in range(3)]
        for step in range(4):
            rows = task_rows(5, seed=step)
            matrix = gram(rows)
            weights = pcgrad_weights(matrix, draw_order(5, seed, step))
            guard = update_guard(matrix, weights, max_norm=1.0)
            combine_adamw_(rows, weights, *state, lr=0.1, step=step + 1, scale=guard.scale)
        return state[0]

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))
