"""Pack batches in a background thread while the device works on the one before."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from ..utils.arrays import Indices
from .batch_shapes import OneShape, RoundedShapes, ShapePlan, Shapes
from .collate import PackedBatch, pack
from .sampler import Sampler
from .split import TokenizedSplit
from .task_batch import Examples
from .task_schedule import ScheduledBatch

_PLANNED = 512
"""Batches that shapes are planned from, at most."""


class TrainingLoader:
    """An iterator over the training batches of steps ``start`` to ``stop``.

    A step whose batch is split into micro-batches yields these, one after the other.

    Use it in a ``with`` statement, which ends the thread however the loop is left.  An exception in
    the thread is raised where the batch was asked for.
    """

    def __init__(
        self,
        sources: Sequence[Examples],
        samplers: Sequence[Sampler],
        start: int,
        stop: int,
        *,
        schedule: Callable[[int], Sequence[ScheduledBatch]] | None = None,
        shapes: int = 0,
        token_multiple: int = 1,
        micro_batches: int = 1,
        shard: tuple[int, int] = (0, 1),
        plan_lookups: Callable[[PackedBatch], PackedBatch] | None = None,
        pin_memory: bool = False,
        depth: int = 4,
    ) -> None:
        """Start packing.

        Args:
            sources: the examples that each task is trained on.
            samplers: draw each task's batches.
            start: the first step, 0 for a run that begins.
            stop: one past the last step.
            schedule: returns the batches of a step, by its number; None for one of each task.
            shapes: pad batches, so that there are at most so many shapes; 0 for any.  The batches
                of all ranks in one step get the same.
            token_multiple: pad every task's tokens to a multiple, where ``shapes`` is 0.
            micro_batches: how many a step's batch is split into, each with a share of every task.
            shard: (rank, ranks); the examples of a step, task after task, are dealt to the ranks
                one by one, but for those of samplers whose ranks have examples of their own.
            plan_lookups: adds to a batch the plan of its lookups; None where steps need none.
            pin_memory: put the batches in pinned memory, for copies that do not block.
            depth: the most batches that wait.

        Raises:
            ValueError: a step has fewer examples than there are ranks, or a task's batch fewer
                than there are micro-batches on all ranks.
        """
        rank, ranks = shard

        def every_task(step: int) -> list[ScheduledBatch]:
            return [ScheduledBatch(task, step) for task in range(len(samplers))]

        scheduled = schedule or every_task
        sizes = [sampler.batch_size for sampler in samplers]
        examples = sum(sizes) if len(scheduled(min(start, stop - 1))) > 1 else min(sizes)
        if examples < ranks or (micro_batches > 1 and min(sizes) < ranks * micro_batches):
            raise ValueError(
                f"shard: {examples} examples of a step cannot be divided among {ranks} ranks and "
                f"{micro_batches} micro-batches"
            )

        def choose(number: int, rank: int = rank) -> tuple[list[Examples], list[Indices]]:
            step, micro_batch = divmod(number, micro_batches)
            of_step = scheduled(step)
            drawn = [samplers[each.task] for each in of_step]
            batches = [
                sampler.batch(each.batch) for sampler, each in zip(drawn, of_step, strict=True)
            ]
            shares = deal(batches, [sampler.by_rank for sampler in drawn], rank, ranks)
            picks = [np.array_split(share, micro_batches)[micro_batch] for share in shares]
            return [sources[each.task] for each in of_step], picks

        def measure(number: int) -> _Sizes:
            step = number // micro_batches
            return _largest([_measure(*choose(number, each), step) for each in range(ranks)])

        def shapes_of(number: int) -> Shapes | None:
            """The shapes for a batch: of several ranks, one that each rank's batch fits into."""
            if not isinstance(self.shapes, ShapePlan) or ranks == 1:
                return self.shapes
            sizes = measure(number)
            shape = self.shapes.shape(sizes.tasks, sizes.tokens, sizes.longest)
            return OneShape(shape._replace(max_seqlen=max(shape.max_seqlen, sizes.longest)))

        def make(number: int) -> PackedBatch:
            step = number // micro_batches
            batch = replace(
                pack(*choose(number), step, shapes_of(number)),
                step_terms=tuple(
                    sources[each.task].terms(samplers[each.task].batch(each.batch))
                    for each in scheduled(step)
                ),
            )
            if plan_lookups is not None:
                batch = plan_lookups(batch)
            return batch.pin_memory() if pin_memory else batch

        self.shapes: Shapes | None = RoundedShapes(token_multiple) if token_multiple > 1 else None
        """The shapes of all batches; None where there is no padding."""
        if shapes:  # micro-batches come in sequence, so several shapes would make many sequences
            self.shapes = _plan(measure, stop * micro_batches, shapes if micro_batches == 1 else 1)
        self._ready: queue.Queue[PackedBatch | BaseException | None] = queue.Queue(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._produce,
            args=(make, range(start * micro_batches, stop * micro_batches)),
            name="packing",
            daemon=True,
        )
        self._thread.start()

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield the batches in the order of the steps."""
        while not self._closing.is_set():
            item = self._ready.get()
            if isinstance(item, PackedBatch):
                yield item
                continue
            self.close()
            if item is not None:
                raise item

    def close(self) -> None:
        """End the thread; waiting batches are dropped."""
        self._closing.set()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._thread.join()

    def __enter__(self) -> Self:
        """Return the loader."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the loader."""
        self.close()

    def _produce(self, make: Callable[[int], PackedBatch], numbers: range) -> None:
        last: BaseException | None = None
        try:
            for number in numbers:
                if not self._put(make(number)):
                    return
        except BaseException as error:  # raised again where the batch is asked for
            last = error
        self._put(last)

    def _put(self, item: PackedBatch | BaseException | None) -> bool:
        """Queue an item unless the loader was closed; return whether it was.

        ``close`` empties the queue after it set the event, so a ``put`` that waits here gets its
        place, and the next call sees the event: the thread always ends.
        """
        if self._closing.is_set():
            return False
        self._ready.put(item)
        return True


def deal(
    batches: Sequence[Indices], by_rank: Sequence[bool], rank: int, ranks: int
) -> list[Indices]:
    """Return a rank's share of each task's batch."""
    shares, dealt = [], 0
    for batch, is_own in zip(batches, by_rank, strict=True):
        shares.append(batch[(rank if is_own else rank - dealt) % ranks :: ranks])
        dealt += 0 if is_own else len(batch)
    return shares


class _Sizes(NamedTuple):
    """The tasks of a batch, the tokens of each, and those of the longest sequence."""

    tasks: tuple[str, ...]
    tokens: list[int]
    longest: int


def _measure(sources: Sequence[Examples], picks: Sequence[Indices], step: int) -> _Sizes:
    """Return the sizes of a batch."""
    sizes = [source.sequence_sizes(pick, step) for source, pick in zip(sources, picks, strict=True)]
    return _Sizes(
        tuple(source.task for source in sources),
        [int(own.sum()) for own in sizes],
        max(int(own.max(initial=1)) for own in sizes),
    )


def _largest(sizes: Sequence[_Sizes]) -> _Sizes:
    """Return sizes that several batches of the same tasks fit into."""
    tokens = np.array([each.tokens for each in sizes]).max(axis=0).tolist()
    return _Sizes(sizes[0].tasks, tokens, max(each.longest for each in sizes))


def _plan(measure: Callable[[int], _Sizes], batches: int, limit: int) -> ShapePlan:
    """Plan the shapes of a run's batches from the sizes of evenly spaced ones.

    The plan is the same whichever step a run is resumed at, and on all ranks.
    """
    counts: dict[tuple[str, ...], list[list[int]]] = {}
    longest: list[int] = []
    for number in np.unique(np.linspace(0, batches - 1, min(batches, _PLANNED)).astype(int)):
        sizes = measure(int(number))
        counts.setdefault(sizes.tasks, []).append(sizes.tokens)
        longest.append(sizes.longest)
    return ShapePlan({tasks: np.array(rows) for tasks, rows in counts.items()}, limit, longest)


def evaluation_batches(
    split: TokenizedSplit, max_tokens: int
) -> Iterator[tuple[Indices, PackedBatch]]:
    """Yield a whole split in batches of examples of similar length, the longest first.

    Longest first, so that memory that does not suffice shows at once.

    Args:
        split: the split.
        max_tokens: the most tokens in a batch; a longer example makes a batch by itself.

    Yields:
        The indices of the batch's examples, which put its results back in order, and the batch.
    """
    sizes = split.lengths.reshape(len(split), split.columns).sum(axis=1)
    order = np.argsort(-sizes, kind="stable")
    ends = np.concatenate(([0], np.cumsum(sizes[order])))
    start = 0
    while start < len(order):
        within = int(np.searchsorted(ends, ends[start] + max_tokens, side="right")) - 1
        stop = max(start + 1, within)
        yield order[start:stop], pack([split], [order[start:stop]])
        start = stop
