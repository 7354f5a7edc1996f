"""A long run: memory, open files and threads must stay where they are, and logs in bounds."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..conftest import REPOSITORY
from .progress import say

_LOG_MIB, _KEEP_LOGS = 1, 3
_SETTINGS = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=1", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256", "batch_size=4", "epochs=1000000"),
    *("checkpoint_every=500", "log_every=50"),
    *(f"log_mib={_LOG_MIB}", f"keep_logs={_KEEP_LOGS}"),
]
_SECONDS = 2.0
"""Between two samples."""


class Sample(NamedTuple):
    """What a process held when it had made so many steps.

    Attributes:
        step: that it had made.
        resident_mib: memory of its own, without the files of libraries that are mapped into it.
        open_files: their number.
        threads: their number.
    """

    step: int
    resident_mib: float
    open_files: int
    threads: int


def endure(folder: Path, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps in a process of its own and watch it from outside.

    Returns:
        The samples; of each thing that is watched its value after a tenth of the steps, at the end,
        and the peak between; and the log's pieces in MiB.
    """
    options = ["--out", str(folder / "long"), "--device", "cpu", "--max-steps", str(steps)]
    command = [sys.executable, "-m", "engine.train", "demo", *options, "--set", *_SETTINGS]
    with (folder / "long.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
    samples = _watch(process, folder / "long" / "metrics.jsonl", steps)
    assert process.returncode == 0, (folder / "long.log").read_text()
    settled = [sample for sample in samples if sample.step >= steps / 10]
    pieces = sorted((folder / "long").glob("metrics*.jsonl"))
    return {
        "steps": steps,
        **{name: _course(settled, name) for name in Sample._fields[1:]},
        "log_pieces_mib": {piece.name: piece.stat().st_size / 2**20 for piece in pieces},
        "log_mib": _LOG_MIB,
        "keep_logs": _KEEP_LOGS,
        "samples": samples,
    }


def _watch(process: subprocess.Popen[bytes], metrics: Path, steps: int) -> list[Sample]:
    samples: list[Sample] = []
    while process.poll() is None:
        time.sleep(_SECONDS)
        step = _last_step(metrics)
        if step is not None and (sample := _sample(process.pid, step)) is not None:
            samples.append(sample)
            if len(samples) % 10 == 0:
                say(f"endurance: step {step:,} of {steps:,}, {sample.resident_mib} MiB")
    return samples


def _course(samples: Sequence[Sample], name: str) -> dict[str, float]:
    values = [getattr(sample, name) for sample in samples]
    return {"after_a_tenth": values[0], "at_the_end": values[-1], "peak": max(values)}


def _last_step(metrics: Path) -> int | None:
    """Return the step of the last line that is whole; None where there is none just now."""
    try:
        *_, last, _ = metrics.read_bytes()[-8192:].split(b"\n")
        return int(last.partition(b'"step": ')[2].partition(b",")[0])
    except (OSError, ValueError):
        return None


def _sample(pid: int, step: int) -> Sample | None:
    """Return what a process holds; None when it has just ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        files, threads = (len(os.listdir(f"/proc/{pid}/{what}")) for what in ("fd", "task"))
    except OSError:
        return None
    resident = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return resident and Sample(step, round(int(resident[1]) / 1024, 1), files, threads)
