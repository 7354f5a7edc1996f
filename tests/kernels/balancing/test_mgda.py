"""MGDA."""

import pytest
import torch

from kernels import balancing

from .methods import assert_no_conflict, gradients


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


def test_no_conflict_with_any_task() -> None:
    assert_no_conflict("mgda")
