"""DualProj."""

import pytest
import torch

from kernels import balancing

from ..conftest import exact_projector
from .methods import (
    PREFERENCES,
    assert_agrees_with_torchjd,
    assert_no_conflict,
    gradients,
    rows_with_preferences,
)


def test_agrees_with_torchjd(torchjd) -> None:
    # TorchJD adds 1e-4 of the trace to the diagonal before it solves a quadratic program: where
    # gradients conflict strongly the result moves by about the root of that.
    assert_agrees_with_torchjd("dual_projection", torchjd.DualProjWeighting(), 1e-2)


def test_with_preferences_agrees_with_torchjd(torchjd) -> None:
    for rows in rows_with_preferences():
        given = PREFERENCES[: len(rows)]
        matrix = rows @ rows.T
        expected = torchjd.DualProjWeighting(given, exact_projector())(matrix) @ rows
        result = balancing.dual_projection(matrix, given) @ rows
        # Where the hull holds zero, the result is zero up to what regularises either.
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_no_conflict_with_any_task() -> None:
    assert_no_conflict("dual_projection")


def test_preferences_decide_whose_gradient_is_projected() -> None:
    rows = gradients(3, 4, 9)
    matrix = rows @ rows.T
    only = torch.tensor([0, 1, 0])  # of any dtype
    projected = balancing.dual_projection(matrix, only)
    torch.testing.assert_close(balancing.upgrad(matrix, only), projected)
    torch.testing.assert_close(balancing.upgrad(matrix, 3 * only), 3 * projected)
    assert ((rows @ (projected @ rows)) > -1e-9).all()


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match=r"pref_vector: expected \[3\], got \[1, 3\]"):
        balancing.dual_projection(matrix, torch.ones(1, 3))
