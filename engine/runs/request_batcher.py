"""Answer requests of many clients in joint batches, within an asyncio program such as a service."""

import asyncio
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..utils.errors import InputError
from .predictor import Example, Prediction, Predictor


class OverloadedError(Exception):
    """More waits than may wait, or the batcher is closed; ask again later."""


class _Request(NamedTuple):
    task: str | None  # None: sentence vectors
    examples: Sequence[Example]
    answer: asyncio.Future[Any]


class RequestBatcher:
    """A predictor whose requests are packed together while it is busy.

    An idle predictor answers a request at once.  Those that come while it computes wait, and then
    all that are of one task go through the model as one batch without padding, up to ``most``
    examples.  So a single client waits for nobody, and many share a pass.

    Answers are those of the predictor within the rounding of other batches.  A request with an
    example that the predictor refuses fails alone.

    Args:
        predictor: answers; it computes in one thread, so that the program's event loop goes on.
        most: examples of a batch, where no single request has more.
        waiting: examples that may wait at once.

    Raises:
        ValueError: ``most`` or ``waiting`` is below 1.
    """

    def __init__(self, predictor: Predictor, *, most: int = 256, waiting: int = 4096) -> None:
        for name, value in {"most": most, "waiting": waiting}.items():
            if value < 1:
                raise ValueError(f"{name} = {value}: expected a whole number from 1 on")
        self._predictor, self._most, self._limit = predictor, most, waiting
        self._requests: deque[_Request] = deque()
        self._worker: asyncio.Task[None] | None = None
        # OpenMP keeps a team of threads for each thread that computes, so it is always the same.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many examples wait."""
        return sum(len(request.examples) for request in self._requests)

    async def predict(self, task: str, examples: Sequence[Example]) -> list[Prediction]:
        """Answer examples, as :class:`.Predictor` does.

        Args:
            task: one of the run's.
            examples: those of one request.

        Returns:
            A prediction for each.

        Raises:
            InputError: as by the predictor, for these examples alone.
            OverloadedError: too many wait, or the batcher is closed.
        """
        return list(await self._ask(task, examples))

    async def embed(self, sentences: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return sentence vectors ``[n, H]``, as :meth:`.Predictor.embed` does.

        Args:
            sentences: those of one request.

        Raises:
            InputError: as by the predictor, for these sentences alone.
            OverloadedError: too many wait, or the batcher is closed.
        """
        return np.asarray(await self._ask(None, sentences), dtype=np.float32)

    async def close(self) -> None:
        """Answer those that wait, and take no more."""
        self._closed = True
        if self._worker is not None and not self._worker.done():
            await asyncio.wait([self._worker])  # which goes on where this is cancelled
        self._thread.shutdown()

    async def _ask(self, task: str | None, examples: Sequence[Example]) -> Sequence[Any]:
        if isinstance(examples, str) or not isinstance(examples, Sequence):
            kind = type(examples).__name__
            raise InputError(f"examples: expected a list of them, got one {kind}; put it in a list")
        if self._closed:
            raise OverloadedError("closed; no more requests are taken")
        if self._requests and self.waiting + len(examples) > self._limit:
            raise OverloadedError(f"{self.waiting} examples wait already; ask again later")
        # A copy, since the client may change its list while others wait for the same batch.
        request = _Request(task, tuple(examples), asyncio.get_running_loop().create_future())
        self._requests.append(request)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        answer: Sequence[Any] = await request.answer
        return answer

    async def _work(self) -> None:
        while self._requests:
            await self._answer(self._next_batch())

    def _next_batch(self) -> list[_Request]:
        """Take the first request and all later ones of its task that fit."""
        first = self._requests.popleft()
        batch, left, count = [first], deque[_Request](), len(first.examples)
        for request in self._requests:
            fits = request.task == first.task and count + len(request.examples) <= self._most
            (batch if fits else left).append(request)
            count += len(request.examples) if fits else 0
        self._requests = left
        return batch

    async def _answer(self, batch: Sequence[_Request]) -> None:
        batch = [request for request in batch if not request.answer.done()]  # whose client left
        if not batch:
            return
        examples = [example for request in batch for example in request.examples]
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.run_in_executor(
                self._thread, self._compute, batch[0].task, examples
            )
        except Exception as error:  # of one of them, or of all
            if len(batch) > 1:  # halves, so that one bad request leaves most of them packed
                middle = len(batch) // 2
                await self._answer(batch[:middle])
                await self._answer(batch[middle:])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        start = 0
        for request in batch:
            end = start + len(request.examples)
            if not request.answer.done():
                request.answer.set_result(answers[start:end])
            start = end

    def _compute(self, task: str | None, examples: list[Any]) -> Sequence[Any]:
        if task is None:
            vectors: Sequence[Any] = self._predictor.embed(examples)  # type: ignore[assignment]
            return vectors
        return self._predictor(task, examples)
