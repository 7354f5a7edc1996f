"""The page on schedules: the shares that it shows are those of the code."""

import re

import numpy as np
import pytest

from engine.data.task_schedule import TASK_SCHEDULES, TaskSchedule, batch_sizes

from .pages import Page

PAGE = Page("task-schedule")
SIZES = (80_000, 8_000, 800)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.section("Shares").splitlines()
    if line.startswith("| `")
]


def numbers(text: str) -> list[float]:
    return [float(one) for one in re.findall(r"\d+(?:\.\d+)?", text.replace(",000", "000"))]


def schedule_of(row: list[str], epochs: int = 10) -> tuple[TaskSchedule, list[int], float]:
    """Return the schedule that a row names, the batches of its tasks and its alpha."""
    settings = row[0]
    (name,) = {one for one in TASK_SCHEDULES if re.search(rf"\b{one}\b", settings)}
    alpha = float((re.findall(r"alpha = ([\d.]+)", settings) or ["0"])[0])
    batches = batch_sizes(32, SIZES, alpha if name == "together" else 0)
    if "by task" in settings:
        batches = [int(number) for number in re.findall(r"\d+", settings)]
    in_set = [-(-size // batch) for size, batch in zip(SIZES, batches, strict=True)]
    return TaskSchedule(name, SIZES, in_set, epochs, 0, alpha), batches, alpha


def test_the_sizes_are_those_of_the_text() -> None:
    text = PAGE.section("Shares")
    assert "80,000, 8,000 and 800 examples, `batch_size = 32`" in text
    assert {name for row in ROWS for name in TASK_SCHEDULES if name in row[0]} == {*TASK_SCHEDULES}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_shares_steps_and_passes(row: list[str]) -> None:
    epochs = 10
    schedule, batches, alpha = schedule_of(row, epochs)
    assert schedule.epoch_steps == int(row[2].replace(",", ""))
    assert row[1].startswith("all tasks") == (schedule.tasks_a_step == 3)
    shown = [float(one) for one in re.findall(r"\d+", row[3])]
    passes = [float(one) for one in row[4].split(",")]
    if schedule.tasks_a_step == 3:
        assert [int(one) for one in shown] == batches
        trained = np.array(batches) * schedule.epoch_steps
        np.testing.assert_allclose(passes, trained / SIZES, atol=0.051)
        return
    tasks = np.array([schedule.batches(step)[0].task for step in range(schedule.total_steps)])
    of_epoch = tasks.reshape(epochs, -1)
    drawn = "drawn" in row[1]
    if "annealed" in row[0]:
        last = "last" in row[0]
        of_epoch, alpha = of_epoch[-1 if last else 0], 0.2 if last else 1
    shares = np.bincount(of_epoch.ravel(), minlength=3) / of_epoch.size
    if drawn:  # expected ones are shown; what is drawn is within four standard deviations
        powers = np.array(SIZES, dtype=np.float64) ** alpha
        expected = powers / powers.sum()
        deviation = np.sqrt(expected * (1 - expected) / of_epoch.size)
        assert (np.abs(shares - expected) < 4 * deviation).all()
        shares = expected
    np.testing.assert_allclose(shown, 100 * shares, atol=0.501)
    np.testing.assert_allclose(passes, shares * schedule.epoch_steps * 32 / SIZES, atol=0.051)


def test_batches_of_together_add_up() -> None:
    """Three batches of 32, however they are shared, and one example at least."""
    for alpha in (0, 0.25, 0.5, 1, 5):
        sizes = batch_sizes(32, SIZES, alpha)
        assert sum(sizes) == 96
        assert min(sizes) >= 1
