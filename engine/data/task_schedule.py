"""Choose the tasks that each step trains.

    together      every step has a batch of every task
    sequential    one task a step: all batches of the first, then all of the second, …
    cycle         one task a step, in rotation; as often as the largest set needs, small ones cycle
    round_robin   one task a step, in rotation; a task whose set is used up drops out
    annealed      one task a step, drawn with probability N^alpha, N the size of its set;
                  alpha = 1 - 0.8 (e - 1) / (E - 1) in epoch e of E (Stickland and Murray 2019)

A schedule is computed for the whole run at once, so that any step can be looked up: a run that is
resumed needs the step's number alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..utils.arrays import Indices
from ..utils.rng import uniforms

TASK_SCHEDULES = ("together", "sequential", "cycle", "round_robin", "annealed")


class ScheduledBatch(NamedTuple):
    """A batch of one task: the task's position, and which of its batches, from 0."""

    task: int
    batch: int


class TaskSchedule:
    """The batches of every step of a run, each of one task.

    Args:
        name: one of TASK_SCHEDULES.
        sizes: examples of each of the K tasks.
        batch_size: examples in a batch.
        epochs: passes; a pass goes once through the largest set (together, cycle), or once through
            every set (the others).
        seed: decides what is drawn.

    Attributes:
        tasks_a_step: K, or 1 where the tasks take turns.
        epoch_steps: steps of an epoch.
        total_steps: steps of all epochs.
    """

    def __init__(
        self, name: str, sizes: Sequence[int], batch_size: int, epochs: int, seed: int
    ) -> None:
        batches = [-(-size // batch_size) for size in sizes]
        together = name == "together"
        self._count = len(sizes)
        self.tasks_a_step = self._count if together else 1
        self._tasks = None if together else _task_of_each_step(name, sizes, batches, epochs, seed)
        per_epoch = max(batches) if together else len(_rotation(name, batches))
        self.epoch_steps, self.total_steps = per_epoch, per_epoch * epochs
        self._batches = None if self._tasks is None else _running_count(self._tasks, self._count)

    def batches(self, step: int) -> list[ScheduledBatch]:
        """Return the batches of a step, in the order of the tasks."""
        if self._tasks is None or self._batches is None:
            return [ScheduledBatch(task, step) for task in range(self._count)]
        return [ScheduledBatch(int(self._tasks[step]), int(self._batches[step]))]


def _task_of_each_step(
    name: str, sizes: Sequence[int], batches: Sequence[int], epochs: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return the task of every step, int64 ``[steps]``."""
    if name != "annealed":
        return np.tile(_rotation(name, batches), epochs)
    steps = sum(batches)
    drawn = []
    for epoch, draws in enumerate(np.split(uniforms(steps * epochs, seed, "annealed"), epochs)):
        alpha = 1 - 0.8 * epoch / max(1, epochs - 1)
        shares = np.array(sizes, dtype=np.float64) ** alpha
        ends = np.cumsum(shares / shares.sum())[:-1]
        drawn.append(np.searchsorted(ends, draws, side="right"))
    return np.concatenate(drawn)


def _rotation(name: str, batches: Sequence[int]) -> Indices:
    """Return the task of every step of one epoch; for ``annealed`` only their number counts."""
    if name == "cycle":
        return np.tile(np.arange(len(batches)), max(batches))
    tasks = np.repeat(np.arange(len(batches)), batches)
    if name != "round_robin":
        return tasks
    rounds = np.concatenate([np.arange(count) for count in batches])
    return tasks[np.lexsort((tasks, rounds))]


def _running_count(tasks: Indices, count: int) -> Indices:
    """Return how often each step's task was trained before."""
    before = np.empty_like(tasks)
    for task in range(count):
        own = tasks == task
        before[own] = np.arange(own.sum())
    return before
