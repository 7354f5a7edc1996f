"""Every task schedule against the definition of its name."""

import numpy as np
import pytest

from engine.data.task_schedule import TASK_SCHEDULES, ScheduledBatch, TaskSchedule, batch_sizes

SIZES, BATCHES = (50, 20, 90), (5, 2, 9)


def scheduled_batches(
    name: str, epochs: int = 2, seed: int = 0
) -> tuple[TaskSchedule, list[ScheduledBatch]]:
    order = TaskSchedule(name, SIZES, BATCHES, epochs, seed)
    return order, [order.batches(step)[0] for step in range(order.total_steps)]


def test_together_has_a_batch_of_every_task():
    order = TaskSchedule("together", SIZES, BATCHES, 2, 0)
    assert (order.tasks_a_step, order.epoch_steps, order.total_steps) == (3, 9, 18)
    assert order.batches(17) == [
        ScheduledBatch(0, 17),
        ScheduledBatch(1, 17),
        ScheduledBatch(2, 17),
    ]


def test_sequential_finishes_a_task_before_the_next():
    order, drawn = scheduled_batches("sequential")
    epoch = [0] * 5 + [1] * 2 + [2] * 9
    assert [batch.task for batch in drawn] == epoch * 2
    assert order.epoch_steps == 16


def test_cycle_goes_round_as_often_as_the_largest_set_needs():
    order, drawn = scheduled_batches("cycle")
    assert [batch.task for batch in drawn] == [0, 1, 2] * 18
    assert order.epoch_steps == 27


def test_round_robin_leaves_out_what_is_used_up():
    _, drawn = scheduled_batches("round_robin", epochs=1)
    assert [batch.task for batch in drawn] == [0, 1, 2] * 2 + [0, 2] * 3 + [2] * 4


def test_annealed_draws_by_size_at_first_and_more_evenly_at_last():
    order = TaskSchedule("annealed", (100, 900), (100, 900), 5, 0)
    tasks = np.array([order.batches(step)[0].task for step in range(order.total_steps)])
    shares = tasks.reshape(5, 1000).mean(axis=1)
    expected = [9**alpha / (1 + 9**alpha) for alpha in (1, 0.8, 0.6, 0.4, 0.2)]
    # A share of 1000 draws has a standard deviation of at most 0.016.
    np.testing.assert_allclose(shares, expected, atol=4 * 0.016)


def test_annealed_differs_by_seed_and_not_by_call():
    assert scheduled_batches("annealed")[1] == scheduled_batches("annealed")[1]
    assert scheduled_batches("annealed")[1] != scheduled_batches("annealed", seed=1)[1]


@pytest.mark.parametrize("name", TASK_SCHEDULES[1:])
def test_a_tasks_batches_follow_one_another(name):
    _, drawn = scheduled_batches(name, epochs=3)
    for task in range(3):
        batches = [batch.batch for batch in drawn if batch.task == task]
        assert batches == list(range(len(batches)))


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_sampled_draws_by_size_to_a_power(alpha):
    order = TaskSchedule("sampled", (100, 900), (100, 900), 5, 0, alpha)
    tasks = np.array([order.batches(step)[0].task for step in range(order.total_steps)])
    # A share of 5000 draws has a standard deviation of at most 0.0071.
    np.testing.assert_allclose(tasks.mean(), 9**alpha / (1 + 9**alpha), atol=4 * 0.0071)


@pytest.mark.parametrize(
    ("mean", "sizes", "alpha", "expected"),
    [
        (16, (50, 20, 90), 0, [16, 16, 16]),
        (16, (100, 900), 1, [3, 29]),
        (16, (100, 900), 0.5, [8, 24]),
        (10, (100, 200, 400), 1, [4, 9, 17]),
        (4, (1, 10**9), 1, [1, 7]),  # each has its one
        (1, (1, 10**6, 10**6), 1, [1, 1, 1]),
        (1, (1, 10, 10**6), 0.3, [1, 1, 1]),
        (8, (1, 10, 10**6), 1, [1, 1, 22]),
        (2, (1,) * 9 + (10**12,), 10, [1] * 9 + [11]),
        (100, (1, 10**12), 10, [1, 199]),
        (8, (7,), 1, [8]),
        (8, (2**40, 2**40), 10, [8, 8]),
    ],
)
def test_a_step_has_examples_by_the_sizes_to_a_power(mean, sizes, alpha, expected):
    assert batch_sizes(mean, sizes, alpha) == expected
    assert sum(expected) == mean * len(sizes)


def test_sets_of_other_batch_sizes_last_as_long_as_they_do():
    order = TaskSchedule("together", SIZES, (5, 20, 3), 1, 0)
    assert order.epoch_steps == 20
    assert TaskSchedule("sequential", SIZES, (5, 20, 3), 1, 0).epoch_steps == 5 + 20 + 3
