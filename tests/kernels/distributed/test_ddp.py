"""Gradient surgery in DistributedDataParallel and process groups: one process' result, or one line.

2 ranks are the least, and 4 have sums of more than two terms, a rank without any example among
others, and ranks that are neither first nor last.
"""

from pathlib import Path
from typing import Any

import pytest

from . import ddp_cases
from .ddp_refusals import REFUSED
from .ranks import run

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return each rank's results."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run(ddp_cases.__name__, request.param, folder)


@pytest.mark.parametrize("name", [*ddp_cases.SAME_RESULT, *ddp_cases.WITH_COUNTS])
def test_ranks_train_as_one_process_with_all_examples(name: str, results: Results) -> None:
    found = [of_rank[name] for of_rank in results]
    assert all("raised" not in one for one in found), found
    assert found[0]["error"] <= found[0]["allowed"] < 1e-4
    assert all(one["digest"] == found[0]["digest"] for one in found)
    assert not any(one.get("unused has a gradient") for one in found)


@pytest.mark.parametrize("name", ddp_cases.SAME_WEIGHTS)
def test_weights_are_equal_to_the_bit(name: str, results: Results) -> None:
    found = [of_rank[name] for of_rank in results]
    assert all("digest" in one for one in found), found
    assert all(one == found[0] for one in found)


def test_a_rank_whose_gradients_overflow_skips_the_step_of_all(results: Results) -> None:
    assert all(of_rank["overflow on one rank"]["scales"] == [2.0] * 3 for of_rank in results)


def test_the_wrapper_still_sends_its_buffers(results: Results) -> None:
    """The first rank adds 1 a step; others' additions are overwritten before the next forward."""
    assert all(of_rank["buffers"] == {"seen": [0.0, 1.0, 2.0]} for of_rank in results)


def test_rows_without_an_optimizer_are_averaged_on_request(results: Results) -> None:
    """N numbers are added and divided: each is off by N roundings of the largest at most."""
    for of_rank in results:
        assert of_rank["averaged rows"]["error"] <= len(results) * 2**-24
        assert of_rank["averaged rows"]["reached"] == [[0], [1], [2]]


def test_hooks_of_the_wrapper_are_warned_about_once(results: Results) -> None:
    assert all(of_rank["communication hook"] == {"said": 1, "here": True} for of_rank in results)


def test_no_group_means_this_process_alone(results: Results) -> None:
    digests = [of_rank["process_group=None"]["digest"] for of_rank in results]
    assert all(digest != digests[0] for digest in digests[1:])


SAID = {
    "a step within no_sync": "RuntimeError: step: the gradients are this rank's own",
    "weights that differ": "RuntimeError: step 2: the weights of rank 1 differ from those of",
    "seeds that differ": "RuntimeError: step 0: the seeds or numbers of orders of rank 1 differ",
    "initial weights that differ": "RuntimeError: step 0: the weights of rank 1 differ",
    "tasks that differ": "ValueError: losses: rank 1 and rank 0 differ in their number of tasks",
    "parameters that differ": "ValueError: losses: rank 1 and rank 0 differ in their trained",
    "names that differ": "ValueError: losses: rank 1 and rank 0 differ in their names of tasks",
    "losses of no rank": "ValueError: losses: none has a gradient",
    "two groups": "ValueError: process_group: the optimizer's parameters are in Distributed",
    "FSDP1": "NotImplementedError: FullyShardedDataParallel (FSDP1)",
    "ZeRO-3": "NotImplementedError: DeepSpeed ZeRO-3",
    "mixed_precision of DDP": "NotImplementedError: DistributedDataParallel's mixed_precision",
    "Join": "NotImplementedError: Join: a rank that has no batches left",
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_says_why_it_refuses(name: str, results: Results) -> None:
    for of_rank in results:
        assert of_rank[name]["raised"].startswith(SAID[name])
        assert "\n" not in of_rank[name]["raised"]
