"""Choose the tasks that each step trains.

    together      every step has a batch of every task
    sequential    one task a step: all batches of the first, then all of the second, …
    cycle         one task a step, in rotation; as often as the largest set needs, small ones cycle
    round_robin   one task a step, in rotation; a task whose set is used up drops out
    sampled       one task a step, drawn with probability N^alpha, N the size of its set: 1 as in
                  MT-DNN (Liu et al. 2019), 1 / T as with T5's temperature T (Raffel et al. 2020),
                  0 all alike
    annealed      the same, alpha = 1 - 0.8 (e - 1) / (E - 1) in epoch e of E (Stickland and Murray
                  2019)

Where every step has a batch of every task, alpha decides their shares of it (:func:`batch_sizes`).

A schedule is computed for the whole run at once, so that any step can be looked up: a run that is
resumed needs the step's number alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..utils.arrays import Indices
from ..utils.rng import uniforms

TASK_SCHEDULES = ("together", "sequential", "cycle", "round_robin", "sampled", "annealed")
_DRAWN = ("sampled", "annealed")


class ScheduledBatch(NamedTuple):
    """A batch of one task: the task's position, and which of its batches, from 0."""

    task: int
    batch: int


class TaskSchedule:
    """The batches of every step of a run, each of one task.

    Args:
        name: one of TASK_SCHEDULES.
        sizes: examples of each of the K tasks.
        batches: of each, that go once through its set.
        epochs: passes; a pass goes once through the largest set (together, cycle), or once through
            every set (the others).
        seed: decides what is drawn.
        alpha: of ``sampled``.

    Attributes:
        tasks_a_step: K, or 1 where the tasks take turns.
        epoch_steps: steps of an epoch.
        total_steps: steps of all epochs.
    """

    def __init__(
        self,
        name: str,
        sizes: Sequence[int],
        batches: Sequence[int],
        epochs: int,
        seed: int,
        alpha: float = 0.0,
    ) -> None:
        together = name == "together"
        self._count = len(sizes)
        self.tasks_a_step = self._count if together else 1
        self._tasks = (
            None if together else _task_of_each_step(name, sizes, batches, epochs, seed, alpha)
        )
        per_epoch = max(batches) if together else len(_rotation(name, batches))
        self.epoch_steps, self.total_steps = per_epoch, per_epoch * epochs
        self._batches = None if self._tasks is None else _running_count(self._tasks, self._count)

    def batches(self, step: int) -> list[ScheduledBatch]:
        """Return the batches of a step, in the order of the tasks."""
        if self._tasks is None or self._batches is None:
            return [ScheduledBatch(task, step) for task in range(self._count)]
        return [ScheduledBatch(int(self._tasks[step]), int(self._batches[step]))]


def batch_sizes(mean: int, sizes: Sequence[int], alpha: float) -> list[int]:
    """Return how many examples of each task a step has, by the sizes of their sets to a power.

    Args:
        mean: examples of a task, on average.
        sizes: of the sets.
        alpha: the power; 0 gives all the same.

    Returns:
        One number for each, from 1 on; they add up to ``mean`` times as many as there are tasks.
    """
    shares = _shares(sizes, alpha) * mean * len(sizes)
    whole = np.maximum(1, np.floor(shares)).astype(np.int64)
    missing = mean * len(sizes) - int(whole.sum())
    whole[np.argsort(whole - shares, kind="stable")[: max(0, missing)]] += 1
    for _ in range(-missing):  # the ones of small sets come from those with most beyond their share
        whole[np.argmax(np.where(whole > 1, whole - shares, -np.inf))] -= 1
    return [int(own) for own in whole]


def _shares(sizes: Sequence[int], alpha: float) -> npt.NDArray[np.float64]:
    # Relative to the largest, so that no power of theirs is beyond float64.
    powers = (np.array(sizes, dtype=np.float64) / max(sizes)) ** alpha
    return powers / powers.sum()


def _task_of_each_step(
    name: str,
    sizes: Sequence[int],
    batches: Sequence[int],
    epochs: int,
    seed: int,
    alpha: float,
) -> npt.NDArray[np.int64]:
    """Return the task of every step, int64 ``[steps]``."""
    if name not in _DRAWN:
        return np.tile(_rotation(name, batches), epochs)
    steps = sum(batches)
    drawn = []
    for epoch, draws in enumerate(np.split(uniforms(steps * epochs, seed, name), epochs)):
        if name == "annealed":
            alpha = 1 - 0.8 * epoch / max(1, epochs - 1)
        ends = np.cumsum(_shares(sizes, alpha))[:-1]
        drawn.append(np.searchsorted(ends, draws, side="right"))
    return np.concatenate(drawn)


def _rotation(name: str, batches: Sequence[int]) -> Indices:
    """Return the task of every step of one epoch; of drawn ones their number alone counts."""
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
