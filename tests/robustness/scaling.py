"""The arithmetic of docs/many-gpus.md against steps that 2 and 4 processes really take."""

import itertools
import json
from pathlib import Path
from typing import Any

from engine.distributed.gradient_sync import MODES

from ..launch import torchrun
from .progress import say

RANKS = (2, 4)


def check_scaling(folder: Path, steps: int) -> dict[str, Any]:
    """Measure steps with and without exchange on 2 and 4 processes, in both modes.

    Returns:
        What bench.scaling_check finds, and the seconds ``predicted`` over those ``measured``.
    """
    found = {}
    for mode, ranks in itertools.product(MODES, RANKS):
        name = f"{mode}-{ranks}"
        say(f"scaling: {name}")
        record = folder / f"{name}.json"
        options = ["--standalone", f"--nproc-per-node={ranks}", "-m", "bench.scaling_check"]
        options += [f"--steps={steps}", f"--distribute={mode}", f"--json={record}"]
        check = torchrun(options, folder / "log")
        assert check.wait(timeout=300) == 0, (folder / "log").read_text()
        one = json.loads(record.read_text())
        found[name] = one | {"predicted_over_measured": one["predicted"] / one["measured"]}
    return {"runs": found}
