"""PCGrad between a main task and its auxiliaries."""

import pytest
import torch

from kernels import balancing

from .methods import gradients, update


def test_auxiliary_tasks_enter_as_one() -> None:
    rows = gradients(4, 3)
    auxiliary = 0.3 * rows[1:].sum(0)
    for main in (rows[0], -auxiliary + 0.1 * rows[0]):  # with and without a conflict
        stacked = torch.cat([main[None], rows[1:]])
        expected = main + auxiliary
        if (dot := main @ auxiliary) < 0:
            expected = expected - dot / auxiliary.square().sum() * auxiliary
            expected = expected - dot / main.square().sum() * main
        torch.testing.assert_close(update(balancing.main_aux, stacked), expected)
    swapped = balancing.main_aux((rows @ rows.T).flip(0, 1), main=3)
    torch.testing.assert_close(swapped.flip(0), balancing.main_aux(rows @ rows.T))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_main_aux_of_any_dtype(dtype: torch.dtype) -> None:
    """Also where the sum over the auxiliaries is too large for the Gram matrix's dtype."""
    zeros = balancing.main_aux(torch.zeros(3, 3, dtype=dtype))
    torch.testing.assert_close(zeros, torch.tensor([1, 0.3, 0.3], dtype=dtype))
    rows = gradients(3, 3)
    rows[1] = 2 * rows[2] - rows[0]  # a conflict
    exact = rows @ rows.T
    exact[:2, :2] += 20 * torch.eye(2)
    large = (exact * torch.finfo(dtype).max / exact.max() / 1.01).to(dtype)
    expected = balancing.main_aux(large.double() / large.double().max(), 0, 50.0)
    found = balancing.main_aux(large, 0, 50.0)
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match="main: expected 0 to 2, got 3"):
        balancing.main_aux(matrix, main=3)
