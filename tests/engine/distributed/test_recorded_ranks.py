"""Recorded steps of two ranks: the same decisions, the same exchanges, the bits of eager steps.

Gloo has no CUDA graphs.  A recorder stands in for them that runs nothing when it records and calls
the function when it replays, which are the exchanges that each rank makes with NCCL.
"""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from engine.config import recipe as recipes
from engine.data.collate import PackedBatch
from engine.data.loader import TrainingLoader
from engine.distributed.ranks import Ranks
from engine.runs.run import begin
from engine.runtime.execution import Recorded, Recording
from engine.training.build import build_trainer
from engine.training.trainer import Trainer

from ..conftest import TINY

pytestmark = pytest.mark.long

RANKS, STEPS = 2, 9
CASES = {
    "sharded": ("batch_size=7",),  # the ranks' batches have 4 and 3 examples of a task
    "replicated": ("batch_size=7", "distribute=replicated", "balance_granularity=layer"),
    "in turns": ("batch_size=7", "task_schedule=cycle"),
    "parted": ("batch_size=8", "micro_batches=2"),
    "a task on one rank": ("batch_size=1",),
}


class Replayed:
    """What a recording returns: the report of its last replay."""

    report: Any = None


class CallsAgain:
    """A recorder without CUDA graphs."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def run(self, function, batches):
        self.log.append("run")
        return function(batches)

    def record(self, function, batches):
        self.log.append("record")
        own, held = [batch.map(Tensor.clone) for batch in batches], Replayed()

        def replay() -> None:
            self.log.append("replay")
            held.report = function(own)

        return Recording(own, held, replay)


def batches_of(trainer: Trainer) -> list[list[PackedBatch]]:
    """Each step's batches on this rank, in few shapes as for graphs."""
    count = trainer.recipe.micro_batches
    with TrainingLoader(
        trainer.train_sets,
        trainer.samplers,
        0,
        STEPS,
        schedule=trainer.task_schedule.batches,
        shapes=3,
        micro_batches=count,
        shard=trainer.ranks.shard,
    ) as loader:
        every = list(loader)
    return [every[start : start + count] for start in range(0, len(every), count)]


def train(trainer: Trainer, batches: list[list[PackedBatch]]) -> list[Tensor]:
    """Losses of each step, and the weights after the last."""
    results = []
    for number, batch in enumerate(batches):
        report = trainer.step(batch, number, 1e-3)
        report = report.report if isinstance(report, Replayed) else report
        results += [report.losses.clone(), report.grad_norm.clone()]
    return [*results, trainer.parameters.master.clone(), trainer.parameters.compute.clone()]


def be_a_rank(rank: int, port: int, folder: Path) -> None:
    """Train each case eagerly and recorded; write what was recorded."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
    values = address | {"RANK": rank, "WORLD_SIZE": RANKS, "SUPERBERT_CACHE": folder / "cache"}
    os.environ |= {name: str(value) for name, value in values.items()}
    torch.set_num_threads(1)
    ranks, cpu = Ranks.from_environment(), torch.device("cpu")
    logs, signatures = {}, {}
    with ranks.init(cpu, timeout=120):
        for name, settings in CASES.items():
            recipe = recipes.load("demo", [*TINY, f"max_steps={STEPS}", *settings])
            outcomes = []
            for recorder in (None, CallsAgain()):
                with ranks.main_first():
                    trainer = build_trainer(begin(recipe, folder / name), cpu, ranks)
                batches = batches_of(trainer)
                if recorder is not None:
                    step = trainer.step
                    step._run = Recorded(step._on_device, recorder, 4, ranks.agree)
                    logs[name] = recorder.log
                    signatures[name] = repr([each.signature for each in batches[0]])
                outcomes.append(train(trainer, batches))
            for eager, recorded in zip(*outcomes, strict=True):
                assert torch.equal(eager, recorded), name
        with pytest.raises(AssertionError, match="batches of a step differ in shape"):
            ranks.agree(rank)
    (folder / f"{rank}.json").write_text(json.dumps([logs, signatures]))


def test_two_ranks_record_together_and_train_as_eagerly(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(be_a_rank, (port, tmp_path), nprocs=RANKS)
    (logs, signatures), (other_logs, others) = (
        json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)
    )
    assert logs == other_logs
    for name, log in logs.items():
        assert log.count("record") >= 1, name
        assert log.count("replay") > log.count("record"), name
        assert (signatures[name] == others[name]) == (name == "parted"), name
