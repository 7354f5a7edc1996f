"""Random numbers by names: fixed for ever, so that old runs resume into the same draws."""

import numpy as np
import pytest

from engine.data.task_schedule import TaskSchedule
from engine.utils import rng
from engine.utils.rng import compact_permutation, permutation, uniforms

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


class Repeating:
    """A generator whose numbers come more than once, which 64 random bits do about never."""

    def __init__(self) -> None:
        self.drawn = 0

    def random_raw(self, count: int) -> np.ndarray:
        first, self.drawn = self.drawn, self.drawn + count
        numbers = np.arange(first, self.drawn, dtype=np.uint64)
        return numbers * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(52) << np.uint64(52)


# Of one block, of two blocks of which one has one number, and of a few.
@pytest.mark.parametrize("count", [0, 1, 1000, rng._BLOCK, rng._BLOCK + 1, 5 * rng._BLOCK // 2])
@pytest.mark.parametrize("kind", ["random", "repeating"])
def test_numbers_sorted_in_parts(monkeypatch, count: int, kind: str) -> None:
    if kind == "repeating":
        monkeypatch.setattr(rng, "_generator", lambda *_names: Repeating())
    expected = np.argsort(rng._raw(count, 7, "sst", 2), kind="stable")
    found = compact_permutation(count, 7, "sst", 2)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(permutation(count, 7, "sst", 2), expected)
    assert found.dtype == np.uint32
    assert permutation(count, 7).dtype == np.int64
