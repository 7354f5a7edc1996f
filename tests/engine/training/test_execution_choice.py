"""Recording or compiling that is impossible is refused by name, before anything is trained."""

from pathlib import Path

import pytest
import torch

from engine.config import recipe as recipes
from engine.runs import run as runs
from engine.training.build import build_trainer
from engine.training.trainer import Trainer
from engine.utils.errors import InputError

pytest.importorskip("torchjd")


def build(folder: Path, *settings: str) -> Trainer:
    recipe = recipes.load("demo", ["max_steps=2", *settings])
    return build_trainer(runs.begin(recipe, folder), torch.device("cpu"))


def test_what_waits_for_the_device_is_not_recorded(tmp_path: Path) -> None:
    torchjd = "balance=torchjd.MeanWeighting"
    assert build(tmp_path / "auto", torchjd).step.execution.kind == "eager"
    with pytest.raises(InputError, match=r"execution = graphs: apex's .* wait for the device"):
        build(tmp_path / "graphs", torchjd, "execution=graphs")
