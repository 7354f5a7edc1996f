"""Sweeps whose runs are trained in this process, which need not start one for each."""

import torch
from rich.console import Console

from engine.data.cache import Reading
from engine.runs.halving import score_newest
from engine.runs.job import InProcess, ScoreRun
from engine.train import train_run


def workers_in_process(
    device: torch.device,
    console: Console,
    _jobs: int,
    reading: Reading,
    score: ScoreRun | None = None,
) -> InProcess:
    """Stand for ``sweep.workers_of``."""

    def train(run, steps):
        return train_run(run, device, console, stop_after=steps)

    return InProcess(train, score or (lambda run: score_newest(run, device)), reading)
