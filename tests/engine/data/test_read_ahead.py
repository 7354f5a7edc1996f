"""One item ahead: order, errors, and a thread that nothing waits for once it is forgotten."""

import gc
import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from engine.data.read_ahead import ReadAhead

from .streams import readers


def test_items_come_in_order_one_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(5):
            made.append((number, threading.current_thread().name))
            yield number

    ahead = ReadAhead(items())
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    assert list(ahead) == [3, 4]
    assert [number for number, _ in made] == [0, 1, 2, 3, 4]
    assert {name for _, name in made} == {"reading_0"}
    ahead.close()


def test_an_error_is_raised_where_the_item_is_asked_for() -> None:
    def items() -> Iterator[int]:
        yield 3
        raise ValueError("no more")

    ahead = ReadAhead(items())
    assert next(ahead) == 3
    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            next(ahead)
    ahead.close()


def test_closing_waits_for_the_item_that_is_made() -> None:
    begun, ended = threading.Event(), []

    def items() -> Iterator[int]:
        yield 0
        begun.set()
        time.sleep(0.2)
        ended.append(True)
        yield 1

    before, ahead = readers(), ReadAhead(items())
    assert next(ahead) == 0
    assert begun.wait(30)
    ahead.close()
    assert ended == [True]
    assert not readers() - before
    ahead.close()


@pytest.mark.parametrize("is_in_a_cycle", [False, True])
def test_the_thread_of_a_forgotten_one_ends(is_in_a_cycle) -> None:
    before, ahead = readers(), ReadAhead(count())
    next(ahead)
    (reader,) = readers() - before
    if is_in_a_cycle:
        ahead.itself = ahead
    del ahead
    gc.collect()
    reader.join(30)
    assert not reader.is_alive()


def test_forgetting_one_does_not_wait() -> None:
    """Garbage is collected while locks are held: of a thread that starts, of an import."""
    goes_on = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        goes_on.wait(30)
        yield 1

    before, ahead = readers(), ReadAhead(items())
    assert next(ahead) == 0
    (reader,) = readers() - before
    begun = time.monotonic()
    ahead.itself = ahead
    del ahead
    gc.collect()
    assert time.monotonic() - begun < 20
    assert reader.is_alive()
    goes_on.set()
    reader.join(30)
    assert not reader.is_alive()
