"""What cannot be recorded or compiled is refused by name, before anything is trained."""

from pathlib import Path

import pytest
import torch

from engine import recipe as recipes
from engine import run as runs
from engine.errors import InputError
from engine.training import Training

pytest.importorskip("torchjd")


def build(folder: Path, *settings: str) -> Training:
    recipe = recipes.load("demo", ["max_steps=2", *settings])
    return Training.build(runs.begin(recipe, folder), torch.device("cpu"))


def test_what_waits_for_the_device_is_not_recorded(tmp_path: Path) -> None:
    torchjd = "balance=torchjd.MeanWeighting"
    assert build(tmp_path / "auto", torchjd).step.execution.kind == "eager"
    with pytest.raises(InputError, match=r"execution = graphs: apex's .* wait for the device"):
        build(tmp_path / "graphs", torchjd, "execution=graphs")
