"""PCGradTrainer on two processes: the result, losses and metrics of one process, or one line."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # transformers' Trainer needs it
pytest.importorskip("sentence_transformers")

from . import trainer_cases
from .ranks import run

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return each rank's results."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run(trainer_cases.__name__, 2, folder)


def of(results: Results, name: str) -> Results:
    """Return a case's results, with the same weights on all ranks."""
    found = [of_rank[name] for of_rank in results]
    assert all("raised" not in one for one in found), found
    assert all(one["digest"] == found[0]["digest"] for one in found)
    return found


@pytest.mark.parametrize(
    "name",
    [*trainer_cases.SAME_RESULT, *trainer_cases.IN_BF16, *trainer_cases.COLLECTED],
)
def test_ranks_train_as_one_process_with_all_examples(name: str, results: Results) -> None:
    found = of(results, name)
    most = 0.1 if name in trainer_cases.IN_BF16 else 1e-4
    assert found[0]["error"] <= found[0]["allowed"] < most


@pytest.mark.parametrize("name", trainer_cases.SAME_RESULT)
def test_losses_are_averaged_over_ranks(name: str, results: Results) -> None:
    first, second = of(results, name)
    for of_rank in (first, second):
        assert of_rank["logged"][0] == pytest.approx(of_rank["before"], rel=1e-6)
        assert of_rank["evaluated"] == pytest.approx(of_rank["after"], rel=1e-6)
        for losses, total in zip(of_rank["logged"], of_rank["sums"], strict=True):
            assert sum(losses) == pytest.approx(total, rel=1e-6)
    assert first["logged"] == second["logged"]
    assert first["evaluated"] == second["evaluated"]


@pytest.mark.parametrize("name", ["fewer items", "no items of a task"])
def test_items_are_counted_over_all_ranks(name: str, results: Results) -> None:
    first, _ = of(results, name)
    assert first["error"] < 1e-7  # of weights below 1: a few roundings
    assert first["logged"] == pytest.approx(first["wanted"], rel=1e-6)


def test_a_rank_may_have_no_loss_of_a_task_or_of_any(results: Results) -> None:
    first, second = of(results, "lacking")
    assert first["values"] == second["values"]
    assert first["metrics"] == second["metrics"]
    assert all({"loss_0", "loss_1", "loss_2"} <= set(names) for names in first["logged"])


def test_the_last_batch_may_be_smaller_on_some_ranks(results: Results) -> None:
    first, _ = of(results, "uneven")
    assert first["steps"] == 3
    assert first["error"] <= first["allowed"] < 1e-4


def test_a_resumed_run_has_the_same_bits(results: Results) -> None:
    whole, resumed, stopped = results[0]["resumed"]["digests"]
    assert resumed == whole != stopped
    assert results[1]["resumed"] == results[0]["resumed"]


def test_sentence_transformers_have_as_many_steps_on_each_rank(results: Results) -> None:
    """11 examples make 5 whole batches of 2, which the longest dataset's new beginning makes 6.

    On several ranks sentence-transformers leaves out batches that are not whole.
    """
    first, second = of(results, "every dataset")
    assert first["steps"] == second["steps"] == 3
    assert first["error"] < 1e-6  # of weights below 1: some roundings
