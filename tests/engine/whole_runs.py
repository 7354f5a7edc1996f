"""Compare whole runs."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.checkpoints.store import load_weights
from engine.runs.run import open_run


def metrics(folder: Path) -> list[dict]:
    """The lines of ``metrics.jsonl`` but for the clock's."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["tokens_per_s"]
    return lines


def last_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    path = open_run(folder).checkpoints.find("step")
    (file,) = path.glob("*.safetensors")
    return load_file(file)


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    run = open_run(folder)
    model = run.new_model()
    load_weights(run.checkpoints.find("step"), model)
    return model.state_dict()


def evaluations(folder: Path) -> dict[int, dict[str, float]]:
    """The dev scores by the number of steps done."""
    lines = map(json.loads, (folder / "evaluations.jsonl").read_text().splitlines())
    return {line["step"]: line["scores"] for line in lines}


def written_scores(folder: Path) -> dict:
    """``metrics.json`` but for the memory, which is no run's twice."""
    content = json.loads((folder / "metrics.json").read_text())
    content.pop("memory", None)
    return content


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics(one) == metrics(other)
    assert evaluations(one) == evaluations(other)
    assert open_run(one).checkpoints.progress() == open_run(other).checkpoints.progress()
    first, second = last_checkpoint(one), last_checkpoint(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
