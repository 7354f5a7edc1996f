"""Dropout masks: exact probabilities, the same mask in backward."""

import pytest
import torch

from kernels import dropout
from kernels.dropout.dropout import attention_dropout_factors, dropout_factors

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = torch.tensor(-0x123456789ABCDEF)


@pytest.mark.usefixtures("vector_unit")
@pytest.mark.parametrize("dtype", DTYPES)
# Nothing, less than a quad, around a vector, around a block of 1024, several threads.
@pytest.mark.parametrize("count", [0, 1, 3, 17, 1023, 1029, 40_001])
def test_elements_are_kept_and_scaled_as_the_reference_says(count: int, dtype: torch.dtype) -> None:
    x = torch.randn(count).to(dtype).requires_grad_()
    factors = dropout_factors(count, 0.3, SEED, 5)
    y = dropout(x, 0.3, seed=SEED, rng_offset=5)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y.detach(), (x.detach().float() * factors).to(dtype), rtol=0, atol=0)
    torch.testing.assert_close(x.grad, factors.to(dtype), rtol=0, atol=0)


def test_non_contiguous_input_counts_its_elements_in_logical_order() -> None:
    x = torch.randn(6, 10).t()
    factors = dropout_factors(60, 0.5, SEED, 0).view(10, 6)
    torch.testing.assert_close(dropout(x, 0.5, seed=SEED), x * factors, rtol=0, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.15, 0.5])
def test_the_probability_to_keep_is_exact(p: float) -> None:
    """8-bit thresholds, such as flash-attn's, are 0.17 % off at 0.1; this mean is not."""
    count = 4_000_000
    kept = dropout(torch.ones(count), p, seed=SEED).count_nonzero().item()
    five_sigma = 5 * (count * p * (1 - p)) ** 0.5
    assert abs(kept - count * (1 - p)) < five_sigma
    assert five_sigma < 0.0017 * count


def test_seeds_streams_and_heads_give_masks_of_their_own() -> None:
    x = torch.ones(10_000)
    masks = [
        dropout(x, 0.5, seed=torch.tensor(s), rng_offset=t) for s, t in [(0, 0), (1, 0), (0, 1)]
    ]
    masks += list(attention_dropout_factors(2, 100, 100, 0.5, torch.tensor(0), 0).flatten(1))
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            agree = (mask == other).float().mean().item()
            assert abs(agree - 0.5) < 5 * 0.005  # five standard deviations of 10,000 coins


def test_without_a_seed_torchs_generator_decides() -> None:
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_off_outside_training_and_at_zero() -> None:
    x = torch.randn(10)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


def test_float64_takes_the_same_mask() -> None:
    x = torch.randn(1000, dtype=torch.float64)
    mask = dropout(x, 0.4, seed=SEED) != 0
    assert torch.equal(mask, dropout(x.float(), 0.4, seed=SEED) != 0)
    assert dropout(x.view(40, 25).t(), 0.4, seed=SEED).is_contiguous()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": 1.0}, "probability"),
        ({"p": -0.1}, "probability"),
        ({"p": 0.1, "rng_offset": -1}, "rng_offset"),
        ({"p": 0.1, "rng_offset": 2**32}, "rng_offset"),
        ({"p": 0.1, "seed": torch.tensor(1.0)}, "seed"),
        ({"p": 0.1, "seed": torch.tensor([1, 2])}, "seed"),
    ],
)
def test_unusable_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dropout(torch.ones(4), **arguments)
    with pytest.raises(ValueError, match="x: expected a floating dtype"):
        dropout(torch.ones(4, dtype=torch.int64), 0.1)
