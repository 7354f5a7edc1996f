"""The solvers below the methods."""

import pytest
import torch

from .methods import SOLVERS, gradients


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
    with pytest.raises(ValueError, match="gram must be a contiguous float64"):
        torch.ops.superbert.solve_mgda(matrix)
