"""Multi-Krum."""

import pytest
import torch

from kernels import balancing, gram

from .methods import assert_agrees_with_torchjd, gradients


def test_agrees_with_torchjd(torchjd) -> None:
    assert_agrees_with_torchjd("krum", torchjd.KrumWeighting(0, 1), 1e-9)


def test_krum_does_not_choose_around_a_gradient_that_is_not_finite() -> None:
    rows = gradients(5, 3)
    rows[0, 0] = torch.nan
    assert balancing.krum(gram(rows), num_byzantine=1).isnan().all()


def test_bad_arguments() -> None:
    matrix = torch.eye(3)
    with pytest.raises(ValueError, match="Krum of 3 gradients needs"):
        balancing.krum(matrix, num_byzantine=1)
    with pytest.raises(ValueError, match="num_byzantine from 0"):
        balancing.krum(matrix, num_byzantine=-1)
