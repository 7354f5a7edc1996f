"""Random loss weighting."""

import math

import pytest
import torch

from kernels import balancing, draw_order
from kernels.balancing.rlw import standard_normal

from .scalarizations import GRAM


def test_weights_are_the_softmax_of_standard_normal_numbers() -> None:
    count, seed = 4000, torch.tensor(11)
    drawn = torch.stack([standard_normal(3, seed, torch.tensor(step)) for step in range(count)])
    expected = drawn[7].softmax(0)
    torch.testing.assert_close(balancing.rlw(torch.eye(3).double(), 11, 7), expected)
    # Each statistic within five of its standard deviations.
    assert drawn.mean(0).abs().max() < 5 / math.sqrt(count)
    assert (drawn.var(0) - 1).abs().max() < 5 * math.sqrt(2 / count)
    assert ((drawn**4).mean(0) - 3).abs().max() < 5 * math.sqrt(96 / count)
    correlation = torch.corrcoef(drawn.T) - torch.eye(3)
    assert correlation.abs().max() < 5 / math.sqrt(count)
    after = (drawn[1:] * drawn[:-1]).mean(0)
    assert after.abs().max() < 5 / math.sqrt(count)


def test_they_follow_from_seed_and_step_alone() -> None:
    first = balancing.rlw(GRAM, 3, 5)
    torch.rand(7)
    draw_order(4, 3, 5)
    assert torch.equal(first, balancing.rlw(2 * GRAM, torch.tensor(3), torch.tensor(5)))
    for seed, step in ((4, 5), (3, 6), (3 + 2**40, 5), (3, 5 + 2**40), (-3, 5)):
        assert not torch.equal(first, balancing.rlw(GRAM, seed, step))
    torch.testing.assert_close(first.sum(), torch.tensor(1.0).double())


def test_the_seed_is_read_when_the_weights_are_drawn() -> None:
    """As in a CUDA graph, whose tensors are written between replays."""
    seed = torch.tensor(3)
    first = balancing.rlw(GRAM, seed)
    seed.fill_(4)
    assert torch.equal(balancing.rlw(GRAM, seed), balancing.rlw(GRAM, 4))
    assert not torch.equal(balancing.rlw(GRAM, seed), first)


def test_bad_arguments() -> None:
    for name in ("seed", "step"):
        for bad in (torch.tensor([1]), torch.tensor(1.0)):
            with pytest.raises(ValueError, match=rf"^{name}: expected a 0-dim int64 tensor"):
                balancing.rlw(GRAM, **{"seed": 1, name: bad})
