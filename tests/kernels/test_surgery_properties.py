"""Properties of surgery over random sizes, scales and orders."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.balancing.pcgrad import draw_order, pcgrad_weights
from kernels.surgery.surgery import combine, gram

from .pcgrad_reference import projected_gradients, reference_pcgrad

# Exponents of two: a scale that is no power of two would round the gradients.
scales = st.integers(-40, 40).map(lambda exponent: 2.0**exponent)
examples = settings(max_examples=60, deadline=None)


@st.composite
def problems(draw: st.DrawFn, max_tasks: int = 8) -> tuple[Tensor, Tensor]:
    """Float64 gradients, some rows zero, equal or opposite, and an order."""
    num_tasks = draw(st.integers(1, max_tasks))
    columns = draw(st.integers(1, 40))
    seed = draw(st.integers(0, 2**31))
    rows = torch.randn(
        num_tasks, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    row, other = (draw(st.integers(0, num_tasks - 1)) for _ in range(2))
    kind = draw(st.sampled_from(["plain", "zero", "equal", "opposite"]))
    if kind != "plain" and row != other:
        rows[row] = {"zero": 0.0, "equal": 1.0, "opposite": -1.0}[kind] * rows[other]
    return rows, draw_order(num_tasks, seed, draw(st.integers(0, 5)))


def update(rows: Tensor, order: Tensor) -> Tensor:
    return combine(rows, pcgrad_weights(gram(rows), order))


@given(problems(), scales)
@examples
def test_pcgrad_is_algorithm_1_at_any_scale(problem: tuple[Tensor, Tensor], scale: float) -> None:
    rows, order = problem
    rows = rows * scale
    exact = reference_pcgrad(rows, order)
    # An equal or opposite pair makes dot products that are zero but for rounding: whether such a
    # pair conflicts is open, and what it changes is of the size of that rounding.
    torch.testing.assert_close(update(rows, order), exact, rtol=0, atol=1e-10 * float(rows.norm()))


@given(problems(), st.randoms(use_true_random=False))
@examples
def test_naming_tasks_differently_changes_nothing(problem: tuple[Tensor, Tensor], random) -> None:
    rows, order = problem
    new_name = list(range(len(rows)))
    random.shuffle(new_name)
    names = torch.tensor(new_name)
    renamed_rows, renamed_order = torch.empty_like(rows), torch.empty_like(order)
    renamed_rows[names] = rows
    renamed_order[names] = names[order]
    torch.testing.assert_close(
        update(renamed_rows, renamed_order),
        update(rows, order),
        rtol=0,
        atol=1e-10 * float(rows.norm()),
    )


@given(problems(max_tasks=2))
@examples
def test_two_projected_gradients_do_not_conflict(problem: tuple[Tensor, Tensor]) -> None:
    rows, order = problem
    result = update(rows, order)
    assert (rows @ result).min() >= -1e-9 * rows.square().sum()
    torch.testing.assert_close(result, projected_gradients(rows, order).sum(0))


@given(problems())
@examples
def test_gradients_without_conflict_are_added_up(problem: tuple[Tensor, Tensor]) -> None:
    rows, order = problem
    agreeing = rows.abs()
    torch.testing.assert_close(update(agreeing, order), agreeing.sum(0))


@given(st.integers(1, 64), st.integers(0, 3000), st.integers(0, 2**31), st.integers(0, 5))
@examples
def test_gram_of_any_shape(num_tasks: int, columns: int, seed: int, gap: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(-4, 5, (num_tasks, columns + gap), generator=generator).float()
    rows = flat[:, gap:]
    assert torch.equal(gram(rows), rows @ rows.T)  # whole numbers: exact in float32
