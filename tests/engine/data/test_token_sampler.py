"""Batches of about the same number of tokens, against the stream that they divide."""

import numpy as np
import pytest

from engine.data.sampler import TokenSampler

SIZES = np.random.default_rng(0).integers(1, 40, 97)


@pytest.mark.parametrize("tokens", [39, 40, 128, 1000, int(SIZES.sum()), 5000])
def test_every_pass_has_every_example_once(tokens):
    """Also where a batch is longer than a pass."""
    sampler = TokenSampler("lm", SIZES, tokens, 3)
    drawn = np.concatenate([sampler.batch(step) for step in range(4 * sampler.batches + 9)])
    for epoch in range(3):
        own = drawn[epoch * 97 : (epoch + 1) * 97]
        np.testing.assert_array_equal(np.sort(own), np.arange(97))
    assert not np.array_equal(drawn[:97], drawn[97:194])


def test_batches_have_their_tokens_but_for_a_sequence():
    sampler = TokenSampler("lm", SIZES, 128, 3)
    counts = np.array([SIZES[sampler.batch(step)].sum() for step in range(500)])
    assert (abs(counts - 128) < 40).all()
    assert abs(counts.mean() - 128) < 40 / 500
    assert min(len(sampler.batch(step)) for step in range(500)) >= sampler.batch_size == 3
    assert sampler.batches == -(-SIZES.sum() // 128)


def test_a_batch_is_a_function_of_seed_and_step():
    first, second = TokenSampler("lm", SIZES, 128, 3), TokenSampler("lm", SIZES.copy(), 128, 3)
    for step in (40, 3, 0, 500):
        np.testing.assert_array_equal(first.batch(step), second.batch(step))
    assert not np.array_equal(first.batch(0), TokenSampler("lm", SIZES, 128, 4).batch(0))


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="expected at least 39, got 38"):
        TokenSampler("lm", SIZES, 38, 3)
    with pytest.raises(ValueError, match="no example"):
        TokenSampler("lm", SIZES[:0], 38, 3)
