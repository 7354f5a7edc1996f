"""A step of retrieval is that of all its examples, in how many micro-batches and ranks it comes."""

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.data.loader import TrainingLoader
from engine.data.sampler import TaskSampler
from engine.distributed.gradient_sync import NoSync, build_gradient_sync
from engine.distributed.ranks import Ranks
from engine.gradients.balancing import TrainedTasks
from engine.models.step_scores import StepScores
from engine.training.step import MultitaskStep

from ..retrieval_cases import model_of, split_of
from ..small_models import build_step

RANKS, EXAMPLES, BATCH = 2, 24, 11
"""11: ranks and micro-batches have other numbers of examples."""


def step_of(
    micro_batches: int,
    shard: tuple[int, int] = (0, 1),
    *,
    batch: int = BATCH,
    tasks: tuple[str, ...] = ("replies",),
    loss: str = "default",
    dropout: float = 0.0,
    sync: Callable[..., NoSync] | None = None,
) -> tuple[MultitaskStep, Tensor]:
    """A step that was made, and its loss."""
    splits = [split_of(EXAMPLES, number, task) for number, task in enumerate(tasks)]
    samplers = [TaskSampler(task, EXAMPLES, batch, 0) for task in tasks]
    model = model_of(loss, dropout, tasks).train()
    trained = TrainedTasks(tasks, (EXAMPLES,) * len(tasks))
    step = build_step(model, trained=trained, balance="sum", sync=sync)
    with TrainingLoader(splits, samplers, 0, 1, micro_batches=micro_batches, shard=shard) as some:
        report = step([*some], 0, 1e-2)
    return step, report.losses


@pytest.mark.parametrize("loss", ["default", "triplet"])
@pytest.mark.parametrize("micro_batches", [2, 3, 11])
def test_micro_batches_see_the_negatives_of_the_step(micro_batches: int, loss: str):
    whole, expected = step_of(1, loss=loss)
    parts, found = step_of(micro_batches, loss=loss)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    rows, exact = parts.parameters.rows, whole.parameters.rows
    # Sums of a few hundred fp32 terms in another order.
    assert (rows - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_both_passes_of_a_micro_batch_have_the_same_dropout(monkeypatch):
    """Otherwise the gradients were those of other vectors than the ones that they are taken at."""
    compared = []

    def with_own(self: StepScores, own: Tensor) -> Tensor:
        compared.append(torch.equal(self.scores[self.start : self.start + len(own)], own))
        return torch.cat([self.scores[: self.start], own, self.scores[self.start + len(own) :]])

    monkeypatch.setattr(StepScores, "with_own", with_own)
    step_of(3, dropout=0.3)
    assert compared == [True] * 3


TWO = ("replies", "answers")
CASES = ((1, BATCH, TWO[:1]), (2, BATCH, TWO[:1]), (1, 1, TWO), (2, 5, TWO))
"""Micro-batches, examples, tasks; of one example of each task either rank lacks one."""


def be_a_rank(rank: int, port: int, folder: Path) -> None:
    """Make the steps of all cases; write the loss and how far the gradients are off."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
    values = address | {"RANK": rank, "WORLD_SIZE": RANKS}
    os.environ |= {name: str(value) for name, value in values.items()}
    torch.set_num_threads(1)
    found = []
    with Ranks.from_environment().init(torch.device("cpu"), timeout=120):
        sync = partial(build_gradient_sync, "replicated", RANKS)
        for parts, batch, tasks in CASES:
            step, losses = step_of(parts, (rank, RANKS), batch=batch, tasks=tasks, sync=sync)
            found.append((losses.tolist(), step.parameters.rows.tolist()))
    (folder / f"{rank}.json").write_text(json.dumps(found))


def test_ranks_see_the_negatives_of_the_step(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(be_a_rank, (port, tmp_path), nprocs=RANKS)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for number, (parts, batch, tasks) in enumerate(CASES):
        whole, expected = step_of(1, batch=batch, tasks=tasks)
        exact = whole.parameters.rows
        for loss, rows in (of_rank[number] for of_rank in found):
            assert loss == pytest.approx(expected.tolist(), rel=1e-5), (parts, batch)
            off = (torch.tensor(rows) - exact).abs().max()
            assert off <= 1e-5 * exact.abs().max(), (parts, batch)
