"""Inputs of a case: a command on a corrupted run or model, or on data of its own."""

import random
from pathlib import Path

from .base import RECIPE, Base

Given = tuple[str, str, list[str]]
"""The corrupted thing, the command, its arguments; the command's output is called ``new``."""


def use_run(base: Base, here: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Return a command that reads a run's folder ``here / "run"``."""
    run, new = str(here / "run"), str(here / "new")
    uses = {
        "report": [run, *draw.choice([[], ["--papers"]]), "--out", new],
        "export": [run, "--to", new],
        "evaluate": [run, "--device", "cpu"],
        "train": [*base.training(here / "run", steps=3), "--resume"],
        "sweep": [*base.training(here / "run"), "--seeds", "2"],
        "fill": [run],
    }
    program = draw.choice(list(uses))
    return program, uses[program]


def with_model(base: Base, here: Path, model: Path) -> list[str]:
    """Return the arguments that train from a model folder."""
    options = ["--data", str(base.data), "--init", str(model), "--out", str(here / "new")]
    settings = ["batch_size=8", "checkpoint_every=1", "precision=fp32", "epochs=2"]
    return [RECIPE, *options, "--device", "cpu", "--max-steps", "1", "--set", *settings]
