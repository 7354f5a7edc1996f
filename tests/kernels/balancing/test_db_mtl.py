"""DB-MTL without its moving average."""

import torch

from kernels import balancing

from .methods import gradients
from .scalarizations import GRAM, steps_of_losses


def test_gradients_of_the_logarithms_are_made_as_long_as_the_longest() -> None:
    rows = gradients(4, 7)
    for losses in steps_of_losses(10):
        of_logarithms = rows / losses[:, None]  # d log l = dl / l
        norms = of_logarithms.norm(dim=1)
        expected = (norms.max() / norms) @ of_logarithms
        torch.testing.assert_close(balancing.db_mtl(GRAM, losses) @ rows, expected)


def test_a_loss_or_gradient_of_0_is_left_out() -> None:
    gram, losses = torch.diag(torch.tensor([4.0, 0.0, 9.0, 1.0])), torch.tensor([1.0, 1, 6, 0])
    assert balancing.db_mtl(gram, losses).tolist() == [1.0, 0.0, 2 / 3, 0.0] or torch.allclose(
        balancing.db_mtl(gram, losses), torch.tensor([1.0, 0.0, 2 / 3, 0.0])
    )
    assert balancing.db_mtl(gram, torch.zeros(4)).tolist() == [0.0] * 4
    assert balancing.db_mtl(torch.zeros(4, 4), losses).tolist() == [0.0] * 4
