"""Requests that wait are answered together, each as alone, and a bad one fails alone."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from engine.predict import OverloadedError, RequestBatcher
from engine.utils.errors import InputError


class Recorded:
    """A predictor that records its batches, and computes when it may.

    Attributes:
        batches: the task and the examples of each call.
        threads: that computed.
        may: set while it may compute.
        asked: released by each call.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[str | None, list[str]]] = []
        self.threads = set[int]()
        self.may, self.asked = threading.Event(), threading.Semaphore(0)
        self.may.set()

    def __call__(self, task: str | None, examples: Sequence[str]) -> list[str]:
        self.batches.append((task, [*examples]))
        self.threads.add(threading.get_ident())
        self.asked.release()
        assert self.may.wait(10)
        if "bad" in examples:
            raise InputError(f"example {examples.index('bad')}: bad")
        return [f"{task}:{example}" for example in examples]

    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        lengths = [len(answer) for answer in self(None, sentences)]
        return np.array(lengths, dtype=np.float32)[:, None]

    async def is_asked(self) -> None:
        assert await asyncio.to_thread(self.asked.acquire, True, 10)


def batcher_of(predictor: Recorded, **settings: int) -> RequestBatcher:
    return RequestBatcher(predictor, **settings)  # type: ignore[arg-type]


async def asked_while_busy(
    predictor: Recorded, batcher: RequestBatcher, requests: Sequence[tuple[str | None, list[str]]]
) -> list[Any]:
    """Ask for all requests while a first one is computed; return their answers."""
    predictor.may.clear()
    first = asyncio.create_task(batcher.predict("first", ["example"]))
    await predictor.is_asked()
    answers = [
        asyncio.create_task(batcher.embed(own) if task is None else batcher.predict(task, own))
        for task, own in requests
    ]
    await asyncio.sleep(0)  # they wait now
    predictor.may.set()
    assert await first == ["first:example"]
    return await asyncio.gather(*answers, return_exceptions=True)


def test_an_idle_predictor_answers_at_once() -> None:
    async def ask() -> None:
        predictor = Recorded()
        batcher = batcher_of(predictor)
        for number in range(3):
            assert await batcher.predict("a", [str(number)]) == [f"a:{number}"]
        assert [len(examples) for _, examples in predictor.batches] == [1, 1, 1]
        assert await batcher.predict("a", []) == []

    asyncio.run(ask())


def test_requests_of_a_task_that_wait_share_a_batch() -> None:
    async def ask() -> None:
        predictor = Recorded()
        requests = [("a", ["1", "2"]), ("b", ["3"]), ("a", ["4"]), (None, ["fifth"]), ("b", ["6"])]
        answers = await asked_while_busy(predictor, batcher_of(predictor), requests)
        assert answers[:3] == [["a:1", "a:2"], ["b:3"], ["a:4"]]
        assert answers[3].tolist() == [[10.0]]  # of "None:fifth"
        assert answers[4] == ["b:6"]
        shared = [("a", ["1", "2", "4"]), ("b", ["3", "6"]), (None, ["fifth"])]
        assert predictor.batches[1:] == shared

    asyncio.run(ask())


def test_a_batch_has_an_upper_limit_that_one_request_may_exceed() -> None:
    async def ask() -> None:
        predictor = Recorded()
        requests = [("a", ["1", "2"]), ("a", ["3", "4"]), ("a", ["5"]), ("a", [*"6789"])]
        answers = await asked_while_busy(predictor, batcher_of(predictor, most=3), requests)
        assert answers == [[f"a:{text}" for text in own] for _, own in requests]
        assert [own for _, own in predictor.batches[1:]] == [["1", "2", "5"], ["3", "4"], [*"6789"]]

    asyncio.run(ask())


def test_a_bad_request_fails_alone() -> None:
    async def ask() -> None:
        predictor = Recorded()
        requests = [("a", ["1"]), ("a", ["2", "bad"]), ("a", ["3"])]
        answers = await asked_while_busy(predictor, batcher_of(predictor), requests)
        assert answers[::2] == [["a:1"], ["a:3"]]
        assert isinstance(answers[1], InputError)
        assert str(answers[1]) == "example 1: bad"  # by its place in its own request

    asyncio.run(ask())


def test_a_bad_request_leaves_most_others_packed() -> None:
    async def ask() -> None:
        predictor = Recorded()
        requests = [("a", ["bad" if number == 20 else str(number)]) for number in range(64)]
        answers = await asked_while_busy(predictor, batcher_of(predictor), requests)
        assert [type(answer) for answer in answers].count(InputError) == 1
        assert isinstance(answers[20], InputError)
        # The batch, then two halves of each of 64, 32, 16, 8, 4 and 2 requests
        assert len(predictor.batches[1:]) == 1 + 2 * 6

    asyncio.run(ask())


def test_one_thread_computes() -> None:
    async def ask() -> None:
        predictor = Recorded()
        batcher = batcher_of(predictor, most=1)
        for _ in range(50):
            await asyncio.gather(*(batcher.predict("a", [text]) for text in "123"))
        assert len(predictor.threads) == 1

    asyncio.run(ask())


def test_too_many_are_turned_away_but_never_the_only_one() -> None:
    async def ask() -> None:
        predictor = Recorded()
        requests = [("a", ["1", "2"]), ("a", ["3", "4"]), ("a", ["5"])]
        batcher = batcher_of(predictor, waiting=3)
        answers = await asked_while_busy(predictor, batcher, requests)
        assert answers[::2] == [["a:1", "a:2"], ["a:5"]]
        assert isinstance(answers[1], OverloadedError)
        assert str(answers[1]) == "2 examples wait already; ask again later"
        assert batcher.waiting == 0
        assert len(await batcher.predict("a", [*"123456"])) == 6

    asyncio.run(ask())


def test_a_client_that_leaves_is_not_computed_for() -> None:
    async def ask() -> None:
        predictor = Recorded()
        batcher = batcher_of(predictor)
        predictor.may.clear()
        first = asyncio.create_task(batcher.predict("a", ["1"]))
        await predictor.is_asked()
        gone, stays = (asyncio.create_task(batcher.predict("a", [text])) for text in "23")
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        predictor.may.set()
        assert await first == ["a:1"]
        assert await stays == ["a:3"]
        assert predictor.batches == [("a", ["1"]), ("a", ["3"])]

    asyncio.run(ask())


def test_closing_answers_those_that_wait_and_takes_no_more() -> None:
    async def ask() -> None:
        predictor = Recorded()
        batcher = batcher_of(predictor)
        await batcher.close()  # before the first request
        predictor, batcher = Recorded(), batcher_of(predictor)
        waiting = [asyncio.create_task(batcher.predict("a", [text])) for text in "123"]
        await asyncio.sleep(0)
        await batcher.close()
        assert all(task.done() for task in waiting)
        with pytest.raises(OverloadedError, match="closed"):
            await batcher.predict("a", ["4"])

    asyncio.run(ask())


@pytest.mark.parametrize("settings", [{"most": 0}, {"waiting": 0}])
def test_limits_are_at_least_one(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="= 0: expected a whole number from 1 on"):
        batcher_of(Recorded(), **settings)


@pytest.mark.parametrize("examples", ["a text", 5, None, {"a", "b"}])
def test_a_request_is_a_list(examples: Any) -> None:
    with pytest.raises(InputError, match="expected a list of them"):
        asyncio.run(batcher_of(Recorded()).predict("a", examples))


def test_a_list_that_changes_meanwhile_shifts_no_answers() -> None:
    changing = ["a"]

    class Changing(Recorded):
        def __call__(self, task: str | None, examples: Sequence[str]) -> list[str]:
            if task == "t":
                changing.append("c")
            return super().__call__(task, examples)

    async def ask() -> None:
        predictor = Changing()
        batcher = batcher_of(predictor)
        answers = await asked_while_busy(predictor, batcher, [("t", changing), ("t", ["b"])])
        assert answers == [["t:a"], ["t:b"]]
        await batcher.close()

    asyncio.run(ask())


def test_a_close_that_is_cancelled_leaves_no_request_without_an_answer() -> None:
    async def ask() -> None:
        predictor = Recorded()
        batcher = batcher_of(predictor)
        predictor.may.clear()
        answers = [asyncio.create_task(batcher.predict(task, ["a"])) for task in ("t", "u")]
        await predictor.is_asked()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.close(), 0.05)
        predictor.may.set()
        assert await asyncio.wait_for(asyncio.gather(*answers), 5) == [["t:a"], ["u:a"]]
        await batcher.close()

    asyncio.run(ask())
