"""Compare the end of runs to the bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from engine.runs.run import open_run


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
