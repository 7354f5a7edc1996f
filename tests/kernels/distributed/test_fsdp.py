"""Gradient surgery on sharded parameters: FSDP2, replicated shards (HSDP), tensor parallelism.

2 ranks shard a bias of one number so that one of them holds nothing, 4 ranks divide 6 columns
unevenly and make two replicas of two shards.
"""

from pathlib import Path
from typing import Any

import pytest

from . import fsdp_cases
from .ranks import run

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return each rank's results."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run(fsdp_cases.__name__, request.param, folder)


@pytest.mark.parametrize("name", fsdp_cases.SAME_RESULT)
def test_shards_are_trained_as_one_process_would(name: str, results: Results) -> None:
    found = [of_rank[name] for of_rank in results]
    assert all("raised" not in one for one in found), found
    assert found[0]["error"] <= found[0]["allowed"] < 1e-4
    assert all(one["digest"] == found[0]["digest"] for one in found)
    assert not any(one["unused has a gradient"] for one in found)


def test_the_state_is_saved_and_restored_by_shards(results: Results) -> None:
    assert all(of_rank["state"] == {"same": True} for of_rank in results)


def test_gradients_of_mixed_precision_are_float32(results: Results) -> None:
    """All but the unused layer's 2 of 13 parameters move."""
    expected = {"moved": 11, "finite": True, "dtypes": ["torch.float32"]}
    assert all(of_rank["mixed precision"] == expected for of_rank in results)


SAID = {
    "a task of one rank": "ValueError: losses: task 1 has a loss on 1 of ",
    "TaskGradients": "NotImplementedError: embedding.weight: is sharded",
    "seeds that differ": "RuntimeError: step 0: the seeds or numbers of orders of rank 1 differ",
    "TaskGradients, sharded later": "NotImplementedError: embedding.weight: is sharded",
}


@pytest.mark.parametrize("name", SAID)
def test_every_rank_says_why_it_refuses(name: str, results: Results) -> None:
    for of_rank in results:
        assert of_rank[name]["raised"].startswith(SAID[name])


def test_replicas_of_shards_are_compared(results: Results) -> None:
    said = "RuntimeError: step 0: the weights of rank 2 differ from those of rank 0"
    for of_rank in results:
        found = of_rank["weights that differ"]
        assert found["raised"].startswith(said) if len(results) == 4 else found is None
