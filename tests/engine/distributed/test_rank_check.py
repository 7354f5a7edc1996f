"""Ranks that do not have the same weights or random state any more end the run."""

from pathlib import Path

import pytest
import torch

from engine.cli.common import LOST_RANK
from engine.distributed.rank_check import Mismatch, RankCheck
from engine.distributed.ranks import Ranks
from engine.runs.run import open_run

from ..conftest import TINY
from ..launch import start

STEPS = ("max_train_examples=640", "max_steps=6", "checkpoint_every=2")
EVERY_STEP, EVERY_OTHER = "check_ranks_every=1", "check_ranks_every=2"
RUNS = {
    "undisturbed": ("", (EVERY_STEP, "max_steps=2")),
    "another seed": ("another_seed", ()),
    "another order": ("draw_another_order", (EVERY_STEP,)),
    "another weight": ("flip_weight", (EVERY_OTHER, "distribute=replicated")),
}


@pytest.mark.long
def test_ranks_that_drift_end_the_run_on_all_of_them(tmp_path: Path) -> None:
    runs = []
    for name, (drift, settings) in RUNS.items():
        options = ["--out", str(tmp_path / name), "--device", "cpu"]
        runs.append([drift, ["demo", *options, "--set", *TINY, *STEPS, *settings]])
    log = tmp_path / "log"
    program = "tests.engine.distributed.drifting_ranks"
    statuses = [process.wait(timeout=120) for process in start(2, runs, log, program=program)]
    assert statuses == [LOST_RANK] * 2, log.read_text()
    for rank in range(2):
        said = {name: (tmp_path / f"{name}-{rank}").read_text() for name in list(RUNS)[:-1]}
        assert said["undisturbed"] == "status 0"
        differ = f"rank {rank} of 2: rank 0 and rank 1 differ in"
        assert said["another seed"] == (
            f"InputError: {differ} weights, seed or step number before training; give all ranks "
            "the same recipe, options and --init"
        )
        rest = "a machine is faulty, or the machines differ; kept: step-00000002"
        assert said["another order"] == (
            f"DriftError: {differ} seed or step number after step 3: {rest}"
        )
        line = f"error: {differ} weights after step 4: {rest}; start again with --resume\n"
        assert line in log.read_text()
    assert "Traceback" not in log.read_text()
    assert open_run(tmp_path / "another weight").checkpoints.progress().step == 2


class ToldRanks(Ranks):
    """Ranks of which the others' numbers are told."""

    def __init__(self, *others: list[int]) -> None:
        super().__init__(0, 1 + len(others))
        self.others = others
        self.compared: list[list[int]] = []

    def have_equal(self, numbers) -> bool:
        self.compared.append(list(numbers))
        return all(other == numbers for other in self.others)

    def gather(self, numbers) -> list[list[int]]:
        return [list(numbers), *self.others]


def taken(check: RankCheck) -> dict[int, list[int]]:
    return {step: sums.tolist() for step, sums in check._waiting.items()}


def test_checksums_are_taken_every_few_steps_and_compared_together() -> None:
    weights, seed = torch.randn(5), torch.tensor(3)
    ranks = ToldRanks()
    ranks.size = 2
    check = RankCheck(ranks, 3, {"weights": [weights], "seed": [seed]})
    for step in range(1, 8):
        seed += 1
        check.add(step)
        check.add(step)
    assert list(taken(check)) == [3, 6]
    check.add(7, now=True)
    own = taken(check)
    assert list(own) == [3, 6, 7]
    assert own[3][0] == own[6][0]
    assert own[3][1] != own[6][1]
    assert check.mismatch() is None
    assert ranks.compared == [[*own[3], *own[6], *own[7]]]
    check.add(7, now=True)  # that step was compared
    assert check.mismatch() is None
    assert len(ranks.compared) == 1


@pytest.mark.parametrize(("size", "every"), [(1, 1), (2, 0)])
def test_one_process_or_zero_takes_none(size: int, every: int) -> None:
    ranks = ToldRanks()
    ranks.size = size
    check = RankCheck(ranks, every, {"weights": [torch.randn(5)]})
    check.add(1)
    check.add(2, now=True)
    assert not taken(check)
    assert check.mismatch() is None
    assert not ranks.compared


A, B, C = [1, 1], [1, 2], [2, 3]


@pytest.mark.parametrize(
    ("others", "between", "names"),
    [
        ([B], "rank 0 and rank 1 differ", ("seed",)),
        ([A, B], "rank 2 differs from ranks 0-1", ("seed",)),
        ([B, B, B], "rank 0 differs from ranks 1-3", ("seed",)),
        ([A, B, A, A, C], "ranks 2, 5 differ from ranks 0-1, 3-4", ("weights", "seed")),
        ([B, B, A], "ranks 0, 3 and ranks 1-2 differ", ("seed",)),
        ([B, C], "rank 0 and rank 1 and rank 2 differ", ("weights", "seed")),
        ([A, B] * 10 + [A] * 4, "ranks 2, 4, 6, 8, 10, 12, 14, 16, … differ from", ("seed",)),
    ],
)
def test_a_mismatch_names_ranks_and_what_differs(others, between, names) -> None:
    check = RankCheck(ToldRanks(*others), 1, {"weights": [], "seed": []})
    check._waiting[8] = torch.tensor(A)
    found = check.mismatch()
    assert isinstance(found, Mismatch)
    assert found.steps_done == 8
    assert found.names == names
    assert found.between.startswith(between)


def test_the_first_step_that_differs_is_named() -> None:
    check = RankCheck(ToldRanks([*A, *A, *B, *C]), 1, {"weights": [], "seed": []})
    check._waiting |= {step: torch.tensor(A) for step in (2, 4, 6, 8)}
    found = check.mismatch()
    assert found is not None
    assert (found.steps_done, found.names) == (6, ("seed",))
