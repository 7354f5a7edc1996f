"""A long run: memory and open files must stay where they are."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..runtime.launch import REPOSITORY

_SETTINGS = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256", "batch_size=4", "epochs=1000000"),
    *("checkpoint_every=500", "log_every=50"),
]


def endure(folder: Path, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps in a process of its own and watch it from outside.

    Returns:
        Resident MiB and open files after a tenth of the steps and at the end, and their peaks.
    """
    arguments = [
        "demo",
        "--out",
        str(folder / "long"),
        "--device",
        "cpu",
        "--max-steps",
        str(steps),
    ]
    with (folder / "long.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.train", *arguments, "--set", *_SETTINGS],
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    metrics = folder / "long" / "metrics.jsonl"
    samples: list[tuple[int, float, int]] = []
    while process.poll() is None:
        time.sleep(0.5)
        if metrics.exists() and (sample := _sample(process.pid)) is not None:
            with metrics.open("rb") as file:
                samples.append((sum(1 for _ in file), *sample))
    assert process.returncode == 0, (folder / "long.log").read_text()
    settled = [sample for sample in samples if sample[0] >= steps / 10]
    return {
        "steps": steps,
        "resident_mib": {
            "after a tenth": settled[0][1],
            "at the end": settled[-1][1],
            "peak": max(sample[1] for sample in settled),
        },
        "open_files": {
            "after a tenth": settled[0][2],
            "at the end": settled[-1][2],
            "peak": max(sample[2] for sample in settled),
        },
        "metrics_mib": round(metrics.stat().st_size / 2**20, 1),
    }


def _sample(pid: int) -> tuple[float, int] | None:
    """Return a process's resident MiB and its open files; None when it has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except (OSError, IndexError):
        return None
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1), files
