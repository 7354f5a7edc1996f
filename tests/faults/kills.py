"""``kill -9`` at random moments of a run on some ranks; resumed, it must end with the same bits."""

import json
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.run import open_run

from ..runtime.launch import start

_SETTINGS = [
    *("encoder.hidden_size=32", "encoder.num_hidden_layers=2", "encoder.num_attention_heads=2"),
    *("encoder.intermediate_size=48", "encoder.vocab_size=256", "limit=320"),
    *("checkpoint_every=2", "log_every=1", "timeout=30"),
]


def kill_runs(
    folder: Path, kills: int, seed: int, *, ranks: int = 2, steps: int = 40
) -> dict[str, Any]:
    """Kill processes ``kills`` times, in as many runs as it takes, and compare their ends.

    Returns:
        ``kills``, ``runs``, ``kills_before_the_first_checkpoint``, and ``different``: the runs
        whose weights, moments or metrics are not those of the undisturbed run to the bit.
    """
    draw = random.Random(seed)
    begun = time.monotonic()
    _finish(_begin(folder / "whole", ranks, steps))
    duration = time.monotonic() - begun
    expected = outcome(folder / "whole")
    shutil.rmtree(folder / "whole")
    done, number, early, different = 0, 0, 0, []
    while done < kills:
        run = folder / f"run-{number}"
        while done < kills:
            processes = _begin(run, ranks, steps)
            if _killed(processes, run, duration, draw):
                done += 1
                early += not list((run / "checkpoints").glob("step-*"))
            else:
                break
        _finish(_begin(run, ranks, steps))  # a run that is finished is not changed by resuming it
        if outcome(run) != expected:
            different.append(run.name)
        shutil.rmtree(run)
        number += 1
    return {
        "kills": done,
        "runs": number,
        "kills_before_the_first_checkpoint": early,
        "different": different,
    }


def outcome(folder: Path) -> list[Any]:
    """Return the last checkpoint's bits and every step's metrics but for the clock's."""
    newest = open_run(folder).checkpoints.find("step")
    assert newest is not None
    bits = [
        (file.name, name, tensor.view(torch.uint8).numpy().tobytes())
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in sorted(load_file(file).items())
    ]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [newest.name, bits, [line | {"tokens_per_s": None} for line in lines]]


def _begin(folder: Path, ranks: int, steps: int) -> list[subprocess.Popen[bytes]]:
    options = ["--out", str(folder), "--resume", "--device", "cpu", "--max-steps", str(steps)]
    arguments = ["demo", *options, "--set", *_SETTINGS]
    folder.parent.mkdir(parents=True, exist_ok=True)
    return start(ranks, [arguments], folder.parent / "log")


def _killed(
    processes: list[subprocess.Popen[bytes]], folder: Path, duration: float, draw: random.Random
) -> bool:
    """Kill one process or both; return False if the run was done by then.

    Half of the moments are anywhere between start and end, half while steps are taken.
    """
    metrics = folder / "metrics.jsonl"
    in_training = draw.random() < 0.5
    before = metrics.stat().st_mtime_ns if metrics.exists() else 0
    end = time.monotonic() + draw.uniform(0, duration)
    while time.monotonic() < end:
        if all(process.poll() is not None for process in processes):
            assert [process.returncode for process in processes] == [0] * len(processes)
            return False
        if in_training and metrics.exists() and metrics.stat().st_mtime_ns > before:
            in_training, end = False, time.monotonic() + draw.uniform(0, 1)
        elif in_training:
            end = time.monotonic() + 1
        time.sleep(0.01)
    victims = draw.choice([processes[:1], processes[1:], processes])
    for process in victims:
        process.send_signal(signal.SIGKILL)
    statuses = [process.wait(timeout=60) for process in processes]
    return -signal.SIGKILL in statuses


def _finish(processes: list[subprocess.Popen[bytes]]) -> None:
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
