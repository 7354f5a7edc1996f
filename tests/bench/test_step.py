"""The step benchmark runs and keeps what it measured; no figure is asserted."""

import json
import sys

import pytest

from bench import plot, step, step_growth


def run(monkeypatch, tmp_path, *arguments: str) -> dict:
    path = tmp_path / "record.json"
    given = ["bench.step", "--device", "cpu", "--rounds", "2", "--json", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", given)
    step.main()
    return json.loads(path.read_text())


@pytest.mark.long
def test_every_contestant_and_its_floor(monkeypatch, tmp_path):
    record = run(monkeypatch, tmp_path, "--batch-size", "2", "--no-compile")
    assert record["environment"]["commit"]
    results = record["results"]
    names = results["seconds"].keys()
    assert {"this engine, fp32, pcgrad", "this engine, fp32, sum"} <= names
    assert {"transformers, fp32, published PCGrad", "transformers, bf16, sum"} <= names
    assert all(len(seconds) == 2 for seconds in results["seconds"].values())
    assert results["peak_bytes"].keys() == names
    assert results["floor_seconds"].keys() == {"matrix products", "surgery and update"}
    assert all(seconds > 0 for seconds in results["phase_seconds"].values())


def test_growth(monkeypatch, tmp_path):
    cases = {"tasks": [step_growth.Case("tiny", tasks, 2) for tasks in (2, 5)]}
    monkeypatch.setattr(step_growth, "CASES", cases)
    record = run(monkeypatch, tmp_path, "--growth")
    small, large = record["results"]["tasks"]
    assert (small["num_tasks"], large["num_tasks"]) == (2, 5)
    assert large["seconds"].keys() == {"pcgrad", "sum"}
    assert plot.draw(record).startswith(b"\x89PNG")
