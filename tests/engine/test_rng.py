"""Random numbers by names: fixed for ever, so that old runs resume into the same draws."""

import numpy as np

from engine.data.task_schedule import TaskSchedule
from engine.utils.rng import permutation, uniforms

ANNEALED = [2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def test_the_numbers_stay_the_same_for_ever():
    found = [number.hex() for number in uniforms(3, 7, "lm", "mask", 2, 5)]
    assert found == ["0x1.8a3b719d7de60p-3", "0x1.b1bc1b6e11bf0p-5", "0x1.aeb25dd42f558p-2"]
    assert permutation(8, 7, "sst", 2).tolist() == [5, 1, 3, 4, 2, 7, 6, 0]
    drawn = TaskSchedule("annealed", (100, 900, 50), (2, 18, 1), 2, 3)
    assert [drawn.batches(step)[0].task for step in range(12)] == ANNEALED


def test_a_prefix_is_drawn_alike_and_other_names_differ():
    np.testing.assert_array_equal(uniforms(5, "a")[:3], uniforms(3, "a"))
    assert not np.array_equal(uniforms(5, "a"), uniforms(5, "b"))
    numbers = uniforms(10_000, 0)
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    assert uniforms(0, "a").shape == permutation(0, "a").shape == (0,)
